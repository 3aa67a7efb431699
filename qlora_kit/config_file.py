"""Read config.yaml, --set and flags into a Config, and report every mistake at once.

    config = load_config(Path("config.yaml"), {"lora.rank": "8"})

Precedence: default < YAML < overrides in their order. The YAML file, the command line and messages share dotted keys such as
`lora.rank`. The `model_fields_set` of a section are the keys that the user insists on: those on the command line, and those of
the file that differ from the default, because config.yaml states them all. Imports no torch, so that mistakes are reported at
once. Does not check that the model, the data or the GPU exists.
"""

import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_kit.config import Config
from qlora_kit.errors import Problem, UserError, closest, did_you_mean
from qlora_kit.secrets import is_secret, secret_problem
from qlora_kit.shipped import KEYS, locate, locate_all, locate_config
from qlora_kit.untrusted import read_regular_file, user_path

LARGEST = 2**18  # bytes of a YAML file, 30 times config.yaml
# Names that peft, transformers and other tools give to our keys.
OTHER_NAMES = {
    "r": "lora.rank",
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
}


def all_keys() -> list[str]:
    """Return every dotted key."""
    return [f"{section}.{key}" for section, values in Config().model_dump().items() for key in values]


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, replace the keys in `overrides` (dotted key -> value) and check the result.

    What the working folder does not have is looked up among the files that come with the toolkit, as shipped.py says.

    Raises:
        UserError: the file cannot be used, or keys or values are wrong: one problem for each mistake.
    """
    values, places, problems = _read_yaml(locate_config(user_path(str(path), "--config")))
    return _build(values, places, overrides or {}, problems)


def override(config: Config, overrides: dict[str, Any]) -> Config:
    """Return a copy of the config with some dotted keys changed; raises UserError like load_config."""
    values = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    return _build(values, {}, overrides, [])


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """Parse `section.key=value` strings into {dotted key: value}; values are read as YAML, so lists and null work."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError("--set", assignment[:200], "has no value", "write KEY=VALUE, such as lora.rank=8")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
            raise UserError("--set", assignment[:200], "is not valid YAML after the =", "quote the value") from None
    return overrides


def _build(values: dict[str, Any], places: dict[str, str], overrides: dict[str, Any], problems: list[Problem]) -> Config:
    values = values | overrides
    places = places | dict.fromkeys(overrides, "command line")
    known_keys, known = all_keys(), {}
    for key, value in values.items():
        if is_secret("" if key in known_keys else key, value):
            problems.append(secret_problem(key, places.get(key, "")))
        elif key in known_keys:
            known[key] = locate_all(value) if key in KEYS else value
        else:
            problem = "is not a key" + did_you_mean(_guess(key, known_keys))
            problems.append(Problem(key, _format(value), problem, f"see {locate('config.yaml')} for every key", places[key]))
    insisted = {key: value for key, value in known.items() if key in overrides or not _is_default(key, value)}
    config, wrong = _validate(insisted, places)
    if wrong:  # the right values are still checked for contradictions, so that every mistake is reported at once
        config, _ = _validate({key: value for key, value in insisted.items() if key not in wrong}, places)
    problems += wrong.values()
    problems += [problem for keys, problem in _contradictions(config) if not wrong.keys() & {problem.key, *keys}]
    if problems:
        raise UserError.of(problems)
    return config


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """Return the values by dotted key, the place of each key (`config.yaml:12`), and the mistakes in the file's structure."""
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
        mark, others = getattr(error, "problem_mark", None), {RecursionError: "nested too deeply", ValueError: str(error)}
        reason = getattr(error, "problem", None) or others.get(type(error), "unreadable")
        place, remedy = str(path), "quote the value" if type(error) is ValueError else "compare it with config.yaml"
        place += f":{mark.line + 1}" if mark else ""
        raise UserError.of([Problem(place, None, f"is not valid YAML ({reason})", remedy)]) from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(loaded, dict):  # a set is a MappingNode as well
        problem = "is empty" if root is None else "is not a mapping of sections"
        raise UserError("--config", path, problem, "start from config.yaml or configs/tiny.yaml")
    return _flatten(path, root, loaded)


def _read_text(path: Path) -> str:
    try:
        return read_regular_file(path, LARGEST).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("--config", path, "does not exist", "start from config.yaml or configs/tiny.yaml") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no regular file, too large
        reason = type(error).__name__ if isinstance(error, OSError | UnicodeDecodeError) else error
        raise UserError("--config", path, f"cannot be read as text ({reason})", "use a YAML file") from None


def _flatten(path: Path, root: yaml.MappingNode, loaded: dict) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    problems = []
    names = [node.value for node, _ in root.value]
    for number, (section_node, body) in enumerate(root.value, 1):
        section, place = section_node.value, f"{path}:{section_node.start_mark.line + 1}"
        if section in names[number:]:  # `loaded` holds the last of them
            problems.append(Problem(section, None, "appears twice", "put all its keys under one", place))
        elif problem := _section_problem(section, loaded.get(section), place):
            problems.append(problem)
        elif loaded[section] is not None:
            for key_node, _ in body.value:
                key, place = f"{section}.{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
                if key in values:
                    problems.append(Problem(key, None, "appears twice", "keep one", place))
                values[key], places[key] = loaded[section].get(key_node.value), place
    return values, places, problems


def _section_problem(section: str, content: Any, place: str) -> Problem | None:
    known = section in Config.model_fields
    if known and (content is None or isinstance(content, dict)):
        return None
    if is_secret("" if known else section, content):
        return secret_problem(section, place)
    if known:
        example = next(key for key in all_keys() if key.startswith(section + "."))
        return Problem(section, _format(content), "holds no keys", f"write keys under it, such as {example}", place)
    problem = "is not a section" + did_you_mean(_guess(section, list(Config.model_fields)))
    return Problem(section, None, problem, f"see {locate('config.yaml')} for every section", place)


def _guess(name: str, known: list[str]) -> str | None:
    """Return the key that was probably meant: by another tool's name, by the same name in another section, or by its spelling."""
    section, _, tail = name.rpartition(".")
    tails = {key.rpartition(".")[2]: key for key in sorted(known, key=lambda key: key.startswith(section + "."))}
    return OTHER_NAMES.get(tail) or tails.get(closest(tail, tails) or "")


def _validate(values: dict[str, Any], places: dict[str, str]) -> tuple[Config, dict[str, Problem]]:
    """Return the config and no problems, or the default config and the problem of each wrong key."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key] = value
    try:
        return Config.model_validate(nested), {}
    except ValidationError as error:
        wrong: dict[str, Problem] = {}
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"][:2])
            wrong.setdefault(key, Problem(key, _format(values[key]), _reason(detail["msg"]), _remedy(key), places[key]))
        return Config(), wrong


def _format(value: Any) -> str:
    """Return a value on one short line: through aliases a YAML file of a few lines can hold a billion items."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother, short.maxlong = 2, 20, 20, 200, 200, 40
    try:
        return short.repr(value)
    except ValueError:  # hexadecimal digits make a number that Python writes no more than 4,300 digits of
        return "a number of thousands of digits"


def _reason(message: str) -> str:
    """Return pydantic's message as a clause."""
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    return message[0].lower() + message[1:].partition(", unable to")[0]


def _default(key: str) -> Any:
    section, name = key.split(".")
    return Config.model_fields[section].default.model_dump()[name]


def _is_default(key: str, value: Any) -> bool:
    return type(value) is type(_default(key)) and value == _default(key)  # True is 1 for Python


def _remedy(key: str) -> str:
    default = yaml.safe_dump(_default(key), default_flow_style=True, width=1000)
    default = default.removesuffix("...\n").strip()
    return f"correct it, or use the default: {default}"


def _contradictions(config: Config) -> Iterator[tuple[set[str], Problem]]:
    """Yield the problem of each set of values that are right alone and wrong together, with the other keys that take part."""
    training, performance = config.training, config.performance
    batch, micro_batch, limit = config.effective_batch, performance.micro_batch, performance.vram_limit_gib
    save_steps, eval_steps, patience = training.save_steps, training.eval_steps, training.early_stopping_patience
    if micro_batch != "auto" and batch % micro_batch:
        problem = f"does not divide the effective batch of {batch} (batch_size x gradient_accumulation_steps)"
        others = {"training.batch_size", "training.gradient_accumulation_steps"}
        yield others, Problem("performance.micro_batch", micro_batch, problem, "use a divisor, or auto")
    if training.device == "cpu" and limit is not None:
        remedy = "set it to null, or the device to auto"
        yield {"training.device"}, Problem("performance.vram_limit_gib", limit, "contradicts training.device cpu", remedy)
    for key, value in (("training.early_stopping_patience", patience), ("training.keep_best", training.keep_best or None)):
        if value is not None and config.data.eval_split is None:
            remedy = "set data.eval_split to a split, or to a fraction such as 0.1"
            yield {"data.eval_split"}, Problem(key, value, "needs evaluations, which data.eval_split null switches off", remedy)
    if training.keeps_best_adapter and save_steps % eval_steps:
        problem = f"is not a multiple of training.eval_steps ({eval_steps}), so the best evaluated adapter might not be saved"
        others = {"training.keep_best", "training.early_stopping_patience", "training.eval_steps"}
        yield others, Problem("training.save_steps", save_steps, problem, "use a multiple of it")
