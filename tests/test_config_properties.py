"""Any config file and any command line give a plan, or one line for each mistake, but never a traceback.

The command is the real one (`python train_qlora.py --plan`), in this process. A slow test has 5,000 cases:
`python -m pytest -m slow tests/test_config_properties.py`.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_qlora
from qlora_kit import cli
from qlora_kit.config_file import all_keys, load_config
from qlora_kit.errors import CONTROL

ROOT = Path(__file__).resolve().parent.parent
KEYS = all_keys()
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
SHIPPED = [(ROOT / "config.yaml").read_text(encoding="utf-8"), (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")]
SETTINGS = settings(
    derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip

# Values that often break parsers, in addition to arbitrary values.
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 10**9, 10**18, 10**40, 1e-320, 1e308, 2**32])
words = st.text(max_size=12) | st.sampled_from([
    "auto", "true", "null", "nan", "1e999", "nf4", "cpu", "assets/tiny-qwen2", "../x", "a\0b", "\x1b[2J", "no/such", ".", "~", "",
    "2026-13-45", "0x", "1_0", "!!python/object/apply:os.getcwd []", "*alias", "hf_", "\ud800", "\u2028", "a" * 5000,
])  # fmt: skip
plain = st.none() | st.booleans() | numbers | words
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3), max_leaves=6)
likely = {
    f"{section}.{name}": st.just(value) | st.sampled_from([1, 8, 0.5, True, None]) | plain
    for section, held in load_config(ROOT / "config.yaml").model_dump().items()
    for name, value in held.items()
}
assignments = st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), likely[key] | st.just(1) | values))


@st.composite
def known_keys(draw) -> str:
    """A file with real keys: some values are valid, others arbitrary."""
    content: dict = {}
    for key, value in draw(st.lists(assignments, max_size=6)):
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = value
    if draw(st.integers(0, 4)) == 0:
        content[draw(st.sampled_from(SECTIONS) | words)] = draw(values)
    return yaml.safe_dump(content, allow_unicode=draw(st.booleans()))


@st.composite
def damaged(draw) -> str:
    """A shipped file with a few passages removed, doubled or replaced."""
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 40)))
        text = text[:start] + draw(st.text(max_size=8) | st.just(text[start:stop] * 2) | words) + text[stop:]
    return text


fragments = st.sampled_from(
    ["model:", "\n", "  ", "lora: ", "rank", ": ", "- ", "[", "{", "&a ", "*a", "<<: ", "|", "? ", "---", "#", "'"]
)
soup = st.lists(fragments | words, max_size=25).map("".join)
files = st.binary(max_size=60) | (known_keys() | damaged() | soup).map(lambda text: text.encode("utf-8", "surrogatepass"))


def as_flag(key: str, value) -> list[str]:
    return ["--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix(chr(10)).removesuffix('...').strip()}"]


set_flags = assignments.map(lambda pair: as_flag(*pair)) | st.builds(
    lambda key, value: ["--set", f"{key}={value}"], st.sampled_from(KEYS + SECTIONS) | words, words
)
named_flags = st.builds(lambda flag, value: [f"--{flag}", str(value)], st.sampled_from(sorted(train_qlora.FLAGS)), plain)
sensible = st.lists(assignments.map(lambda pair: as_flag(*pair)), max_size=2)
command_lines = (sensible | sensible | st.lists(set_flags | named_flags | st.builds(lambda word: [word], words), max_size=4)).map(
    lambda parts: [word for part in parts for word in part]
)


def check(path: Path, content: bytes, words: list[str]) -> None:
    path.write_bytes(content)
    stderr, stdout, status = io.StringIO(), io.StringIO(), None
    with redirect_stderr(stderr), redirect_stdout(stdout):
        try:
            cli.run(lambda: train_qlora.main(["--config", str(path), *words, "--plan"]))
        except SystemExit as ending:
            status = ending.code
    lines = stderr.getvalue().removesuffix("\n").split("\n")
    assert status in (0, 2), stderr.getvalue()
    if status == 0:
        assert stderr.getvalue() == "" and stdout.getvalue()
    else:
        assert stdout.getvalue() == "" and all(line.startswith("error: ") and not CONTROL.search(line) for line in lines), lines


@pytest.fixture
def config_path(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_qlora.py"])
    return tmp_path / "settings.yaml"


@settings(SETTINGS, max_examples=150)
@given(content=files, words=command_lines)
def test_any_config_and_command_line_gives_a_plan_or_one_line_per_mistake(config_path, content, words):
    check(config_path, content, words)


@pytest.mark.slow
@settings(SETTINGS, max_examples=5000)
@given(content=files, words=command_lines)
def test_five_thousand_configs_and_command_lines(config_path, content, words):
    check(config_path, content, words)
