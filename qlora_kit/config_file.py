"""config.yaml as typed settings: file + overrides -> Config, with every mistake named at once.

    config = load_config(Path("config.yaml"), {"lora.rank": "8"})

Precedence: model default < YAML < overrides in their order. Dotted keys (`lora.rank`) are the one vocabulary of the YAML
file, the command line and the messages. Imports no torch, so that a mistake is answered at once. Whether the model, the
data set and the GPU exist is not checked here.
"""

import difflib
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_kit.config import Config
from qlora_kit.errors import UserError
from qlora_kit.secrets import is_secret, refusal

# What peft, transformers and other tools call our keys.
OTHER_NAMES = {
    "r": "lora.rank",
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
}


def all_keys() -> list[str]:
    return [f"{section}.{key}" for section, values in Config().model_dump().items() for key in values]


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file, lay the overrides (dotted key -> value) over it and check the whole.

    Raises:
        UserError: the file cannot be used, or keys or values are wrong: one problem for each mistake.
    """
    values, places, problems = _read_yaml(path)
    return _check(values, places, overrides or {}, problems)


def override(config: Config, overrides: dict[str, Any]) -> Config:
    """The same config with some keys changed; raises UserError as load_config does."""
    values = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    return _check(values, {}, overrides, [])


def _check(values: dict[str, Any], places: dict[str, str], overrides: dict[str, Any], problems: list[str]) -> Config:
    values = values | overrides
    places = places | dict.fromkeys(overrides, "command line")
    known_keys = all_keys()
    # A known key may be called as a secret is: its value alone counts.
    secret = [key for key, value in values.items() if is_secret("" if key in known_keys else key, value)]
    problems += [refusal(places.get(key, "settings"), key) for key in secret]
    values = {key: value for key, value in values.items() if key not in secret}
    known = {key: value for key, value in values.items() if key in known_keys}
    problems += [_unknown(key, value, places[key]) for key, value in values.items() if key not in known]
    config, wrong = _validate(known, places)
    if wrong:  # what is left is still checked for contradictions, so that everything is said at once
        config, _ = _validate({key: value for key, value in known.items() if key not in wrong}, places)
    problems += wrong.values()
    problems += [text for keys, text in _contradictions(config) if not wrong.keys() & keys]
    if problems:
        raise UserError(*problems)
    return config


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`section.key=value` strings -> {dotted key: value}; the value is read as YAML, so lists and null work."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: should be KEY=VALUE, such as --set lora.rank=8")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
            raise UserError(f"--set {assignment}: the value is not valid YAML; quote it") from None
    return overrides


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The file as dotted keys, the place of each (`config.yaml:12`), and what is wrong with its form."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file; start from config.yaml or configs/tiny.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read as text ({error.__class__.__name__}); name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{line}: not valid YAML ({reason}); compare it with config.yaml") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deeply); compare it with config.yaml") from None
    except ValueError as error:  # a date that does not exist
        raise UserError(f"{path}: not valid YAML ({error}); quote the value") from None
    if not isinstance(root, yaml.MappingNode):
        what = "empty" if root is None else "not a mapping of sections"
        raise UserError(f"--config {path}: the file is {what}; start from config.yaml or configs/tiny.yaml")
    return _flatten(path, root, loaded)


def _flatten(path: Path, root: yaml.MappingNode, loaded: dict) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    problems = []
    names = [node.value for node, _ in root.value]
    for number, (section_node, body) in enumerate(root.value, 1):
        section, place = section_node.value, f"{path}:{section_node.start_mark.line + 1}"
        if section in names[number:]:  # the last one is in `loaded`
            problems.append(f"{place}: {section}: stands twice; put all its keys under one")
        elif section not in Config.model_fields and is_secret(section, loaded.get(section)):
            problems.append(refusal(place, section))
        elif section not in Config.model_fields:
            problems.append(f"{place}: {section}: unknown section; {_closest(section, list(Config.model_fields))}")
        elif not isinstance(body, yaml.MappingNode) and is_secret("", loaded[section]):
            problems.append(refusal(place, section))
        elif not isinstance(body, yaml.MappingNode) and loaded[section] is not None:
            problems.append(f"{place}: {section}: {_shown(loaded[section])}: should hold keys, such as {_example(section)}")
        elif isinstance(body, yaml.MappingNode):
            for key_node, _ in body.value:
                key, line = f"{section}.{key_node.value}", key_node.start_mark.line + 1
                if key in values:
                    problems.append(f"{path}:{line}: {key}: stands twice; keep one")
                values[key] = loaded[section].get(key_node.value)
                places[key] = f"{path}:{line}"
    return values, places, problems


def _example(section: str) -> str:
    return next(key for key in all_keys() if key.startswith(section + "."))


def _unknown(key: str, value: Any, place: str) -> str:
    return f"{place}: {key}: {_shown(value)}: unknown key; {_closest(key, all_keys())}"


def _closest(name: str, known: list[str]) -> str:
    """The key that was probably meant: another tool's name for it, the same name in another section, or one spelt alike."""
    section, _, tail = name.rpartition(".")
    if tail in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[tail]}?"
    same_name = [key for key in known if key.rpartition(".")[2] == tail]
    tails = {key.rpartition(".")[2]: key for key in sorted(known, key=lambda key: key.startswith(section + "."))}
    alike = [tails[match] for match in difflib.get_close_matches(tail, tails, n=1, cutoff=0.6)]
    return f"did you mean {(same_name or alike)[0]}?" if same_name or alike else "config.yaml lists every key"


def _validate(values: dict[str, Any], places: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """The checked config and, per wrong key, its problem (then the config returned is the default one)."""
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        nested.setdefault(section, {})[key] = value
    try:
        return Config.model_validate(nested), {}
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"][:2])
            wrong.setdefault(key, f"{places[key]}: {key}: {_shown(values[key])}: {_reason(detail)}; {_remedy(key)}")
        return Config(), wrong


def _shown(value: Any) -> str:
    """A value as Python writes it, the middle of a long one left out: aliases let a YAML file of a few lines hold a billion."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother, short.maxlong = 2, 20, 20, 200, 200, 40
    return short.repr(value)


def _reason(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return message[0].lower() + message[1:].partition(", unable to")[0]


def _remedy(key: str) -> str:
    section, name = key.split(".")
    default = Config().model_dump()[section][name]
    shown = yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"the default is {shown}"


def _contradictions(config: Config) -> list[tuple[set[str], str]]:
    """Values that are fine alone and cannot hold together: the keys that take part, and the problem."""
    training, limit, patience = config.training, config.performance.vram_limit_gib, config.training.early_stopping_patience
    found = []
    micro_batch = config.performance.micro_batch
    if micro_batch != "auto" and config.effective_batch % int(micro_batch):
        found.append(
            (
                {"performance.micro_batch", "training.batch_size", "training.gradient_accumulation_steps"},
                f"performance.micro_batch: {micro_batch}: does not divide the effective batch of {config.effective_batch} "
                "(batch_size x gradient_accumulation_steps); use a divisor, or auto",
            )
        )
    if training.device == "cpu" and limit is not None:
        found.append(
            (
                {"performance.vram_limit_gib", "training.device"},
                f"performance.vram_limit_gib: {limit}: contradicts training.device cpu; set it to null, or the device to auto",
            )
        )
    if patience is not None and config.data.eval_split is None:
        found.append(
            (
                {"training.early_stopping_patience", "data.eval_split"},
                f"training.early_stopping_patience: {patience}: needs evaluations, but data.eval_split is "
                "null; name a split, or a fraction such as 0.1",
            )
        )
    if training.keep_best and config.data.eval_split is None:
        found.append(
            (
                {"training.keep_best", "data.eval_split"},
                "training.keep_best: true: needs evaluations, but data.eval_split is null; "
                "name a split, or a fraction such as 0.1",
            )
        )
    if training.keeps_best_adapter and training.save_steps % training.eval_steps:
        found.append(
            (
                {"training.keep_best", "training.early_stopping_patience", "training.save_steps", "training.eval_steps"},
                f"training.save_steps: {training.save_steps}: the run is to go back to the best evaluated checkpoint, "
                f"so this must be a multiple of training.eval_steps ({training.eval_steps})",
            )
        )
    return found
