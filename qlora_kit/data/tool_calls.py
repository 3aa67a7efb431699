"""Read tools and tool calls, as objects or as JSON text, into the one form that chat templates know.

a tool   {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}
a call   {"type": "function", "function": {"name": ..., "arguments": {...}}}, with an `id` if the record has one
"""

from typing import Any

from qlora_kit.data.fields import check_texts, parse_json_text
from qlora_kit.errors import BadRecord

JsonObject = dict[str, Any]


def read_tools(value: object, name: str) -> list[JsonObject]:
    """Return a list of tools.

    Args:
        value: a list of tools, or of functions without the frame around them, or JSON text of one.
        name: of the field, for messages.

    Raises:
        BadRecord: it is something else.
    """
    tools = parse_json_text(value, name) or []
    if not isinstance(tools, list):
        raise BadRecord(f"{name} holds {type(tools).__name__}, expected a list of tools")
    check_texts(tools, name)
    return [_read_tool(tool, f"tool {number} of {name}") for number, tool in enumerate(tools, 1)]


def _read_tool(value: object, name: str) -> JsonObject:
    tool = parse_json_text(value, name)
    if isinstance(tool, dict) and "type" in tool and "name" not in tool and "function" not in tool:
        return tool  # a tool of the model's own, such as {"type": "python"}
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{name} has no name, expected a function with its name and parameters")
    return tool if "function" in tool else {"type": "function", "function": tool}


def read_calls(value: object, name: str) -> list[JsonObject]:
    """Return a list of tool calls, with their arguments as objects.

    Args:
        value: a call or a list of calls, with or without the frame around name and arguments, or JSON text of one.
        name: of the field, for messages.

    Raises:
        BadRecord: it is something else.
    """
    calls = parse_json_text(value, name) or []
    calls = calls if isinstance(calls, list) else [calls]
    check_texts(calls, name)
    return [_read_call(call, f"call {number} of {name}") for number, call in enumerate(calls, 1)]


def _read_call(value: object, name: str) -> JsonObject:
    call = parse_json_text(value, name)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{name} has no name, expected the name and the arguments of a function")
    given = function.get("arguments", function.get("parameters"))
    arguments = {} if given in (None, "") else parse_json_text(given, f"arguments of {name}")
    if not isinstance(arguments, dict):
        raise BadRecord(f"arguments of {name} hold {type(arguments).__name__}, expected an object or its JSON text")
    check_texts(arguments, name)
    frame = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function"} | frame | {"function": {"name": function["name"], "arguments": arguments}}
