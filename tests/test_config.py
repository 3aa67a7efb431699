"""Settings from config.yaml and the command line: precedence, and one problem for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train_qlora
from qlora_kit.config import Config
from qlora_kit.config_file import all_keys, load_config, override, parse_set
from qlora_kit.errors import Problem, UserError


@pytest.fixture
def load(tmp_path):
    """load(text, overrides): the Config of a file with that text."""

    def load(text: str, overrides: dict | None = None) -> Config:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def problems(load):
    """problems(text, overrides): the printed problems of a file with that text."""

    def problems(text: str, overrides: dict | None = None) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, overrides)
        return caught.value.lines

    return problems


def from_command_line(*words: str) -> Config:
    arguments = train_qlora.parse_arguments(list(words))
    return load_config(arguments.config, train_qlora.overrides(arguments))


def test_config_yaml_equals_the_defaults(root):
    assert load_config(root / "config.yaml") == Config()


def test_config_yaml_contains_every_key(root):
    written = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
    assert sorted(f"{section}.{key}" for section, keys in written.items() for key in keys) == sorted(all_keys())


@pytest.mark.parametrize("name", sorted(path.name for path in Path(__file__).parent.parent.glob("configs/*.yaml")))
def test_each_shipped_config_loads_and_changes_something(root, name):
    assert load_config(root / "configs" / name) != Config()


def test_each_named_flag_sets_an_existing_key():
    assert {key for key, *_ in train_qlora.FLAGS.values()} <= set(all_keys())


def test_precedence_is_default_then_yaml_then_set_then_named_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora: {alpha: 10, dropout: 0.1, rank: 2}\n")
    config = from_command_line("--config", str(file), "--rank", "4", "--set", "lora.rank=3", "--set", "lora.dropout=0.2")
    assert config.training.seed == Config().training.seed  # set nowhere
    assert config.lora.alpha == 10  # the file only
    assert config.lora.dropout == 0.2  # --set over the file
    assert config.lora.rank == 4  # the flag over --set, also where --set comes later


def test_the_last_of_two_sets_wins():
    assert from_command_line("--set", "lora.rank=3", "--set", "lora.rank=5").lora.rank == 5


def test_the_user_insists_on_the_command_line_and_on_what_differs_from_the_default(root, tmp_path):
    """config.yaml states every key; a model that is packed already must not contradict a default that nobody chose."""
    assert load_config(root / "config.yaml").quantization.model_fields_set == set()
    file = tmp_path / "c.yaml"
    file.write_text("quantization: {quant_type: nf4, use_double_quant: false}\n")
    assert load_config(file).quantization.model_fields_set == {"use_double_quant"}
    insisting = from_command_line("--set", "quantization.quant_type=nf4")
    assert insisting.quantization.model_fields_set == {"quant_type"}


def test_a_key_left_out_takes_its_default(load):
    assert load("lora:\n  rank: 4\n") == override(Config(), {"lora.rank": 4})


def test_a_section_without_keys_takes_its_defaults(load):
    assert load("lora:\n") == Config()


def test_exponent_without_a_dot_is_a_number(load):
    assert isinstance(yaml.safe_load("2e-4"), str)  # YAML 1.1 reads a string here
    assert load("training:\n  learning_rate: 2e-4\n").training.learning_rate == 0.0002
    assert from_command_line("--learning_rate", "3e-5").training.learning_rate == 0.00003


def test_the_micro_batch_does_not_change_the_effective_batch(load):
    for micro_batch in (1, 2, 4, 8, 16, "auto"):
        config = load(
            f"training: {{batch_size: 2, gradient_accumulation_steps: 8}}\nperformance: {{micro_batch: {micro_batch}}}\n"
        )
        assert (config.effective_batch, config.performance.micro_batch) == (16, micro_batch)
        assert config.steps_per_epoch(33) == 3  # the last step has a single sequence


@pytest.mark.parametrize("key", ["training.gradient_checkpointing", "performance.compile", "performance.cuda_graphs"])
def test_a_switch_is_true_false_or_auto(load, key):
    section, name = key.split(".")
    for written, expected in [("true", True), ("off", False), ("auto", "auto")]:
        value = getattr(getattr(load(f"{section}:\n  {name}: {written}\n"), section), name)
        assert value == expected and type(value) is type(expected)
    assert getattr(getattr(Config(), section), name) == "auto"


def test_resolved_config_reads_back_equal(tmp_path):
    changes = {
        "training.learning_rate": 1e-5,
        "training.num_epochs": 0.5,
        "data.eval_split": 0.15,
        "data.subset": None,
        "model.name": "modèle/名前",
        "lora.target_modules": "all-linear",
        "performance.micro_batch": 4,
        "training.gradient_checkpointing": False,
        "performance.compile": True,
        "performance.offload_embedding": True,
    }
    config = override(Config(), changes)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(config.to_yaml()).keys() == Config.model_fields.keys()


@pytest.mark.parametrize(
    ("text", "place_key_value", "remedy"),
    [
        ("lora:\n  rnak: 8\n", ":2: lora.rnak: 8: ", "is not a key (did you mean lora.rank?)"),
        ("lora:\n  r: 8\n", ":2: lora.r: 8: ", "did you mean lora.rank?"),
        ("training:\n  lr: 1\n", ":2: training.lr: 1: ", "did you mean training.learning_rate?"),
        ("lora:\n\n  learning_rate: 1\n", ":3: lora.learning_rate: 1: ", "did you mean training.learning_rate?"),
        ("lora:\n  xyzzy: 1\n", ":2: lora.xyzzy: 1: ", "is not a key. See config.yaml"),
        ("# comment\nlorra:\n  rank: 8\n", ":2: lorra: ", "is not a section (did you mean lora?)"),
        ("lora: 3\n", ":1: lora: 3: ", "holds no keys. Write keys under it, such as lora.rank"),
        ("lora: !!set {rank}\n", ":1: lora: {'rank'}: ", "holds no keys"),
        ("lora:\n  alpha: high\n", ":2: lora.alpha: 'high': ", "the default: 32.0"),
        ("lora:\n  rank: 0\n", ":2: lora.rank: 0: ", "the default: 16"),
        ("lora:\n  rank: 8.5\n", ":2: lora.rank: 8.5: ", "the default: 16"),
        ("lora:\n  rank: [8]\n", ":2: lora.rank: [8]: ", "the default: 16"),
        ("lora:\n  rank: null\n", ":2: lora.rank: null: ", "the default: 16"),
        ("lora:\n  rank: yes\n", ":2: lora.rank: true: ", "should be a number, not true or false"),
        ("lora:\n  alpha: true\n", ":2: lora.alpha: true: ", "should be a number, not true or false"),
        ("lora:\n  dropout: 1\n", ":2: lora.dropout: 1: ", "less than 1"),
        ("lora:\n  dropout: .nan\n", ":2: lora.dropout: nan: ", "the default: 0.05"),
        ("lora:\n  target_modules: q_proj\n", ":2: lora.target_modules: 'q_proj': ", "all-linear"),
        ("lora:\n  target_modules: []\n", ":2: lora.target_modules: []: ", "all-linear"),
        ("lora:\n  target_modules: [q_proj, q_proj]\n", ":2: lora.target_modules: ['q_proj', 'q_proj']: ", "twice"),
        ("generation:\n  top_p: 0\n", ":2: generation.top_p: 0: ", "greater than 0"),
        ("training:\n  optim: adam\n", ":2: training.optim: 'adam': ", "'adamw_8bit'"),
        ("training:\n  learning_rate: .inf\n", ":2: training.learning_rate: inf: ", "the default: 0.0002"),
        ("training:\n  seed: 4294967296\n", ":2: training.seed: 4294967296: ", "the default: 42"),  # numpy's limit
        ("training:\n  gradient_checkpointing: maybe\n", ":2: training.gradient_checkpointing: 'maybe': ", "true, false or auto"),
        ("performance:\n  cuda_graphs: yes please\n", ":2: performance.cuda_graphs: 'yes please': ", "true, false or auto"),
        ("performance:\n  compile: null\n", ":2: performance.compile: null: ", "the default: auto"),
        ("performance:\n  offload_embedding: auto\n", ":2: performance.offload_embedding: 'auto': ", "the default: false"),
        ("quantization:\n  compute_dtype: fp16\n", ":2: quantization.compute_dtype: 'fp16': ", "the default: auto"),
        ("data:\n  eval_split: 1.5\n", ":2: data.eval_split: 1.5: ", "a fraction between 0 and 1"),
        ("data:\n  max_length: 4\n", ":2: data.max_length: 4: ", "greater than or equal to 8"),
        ("performance:\n  micro_batch: 2.5\n", ":2: performance.micro_batch: 2.5: ", "auto or a whole number"),
        ("performance:\n  micro_batch: .inf\n", ":2: performance.micro_batch: inf: ", "auto or a whole number"),
        ("model:\n  name: ''\n", ":2: model.name: '': ", "Qwen/Qwen2.5-3B-Instruct"),
        ("lora:\n  rank: 8\n  alpha: 1\n  rank: 9\n", ":4: lora.rank: ", "appears twice"),
        ("lora:\n  rank: 8\nlora:\n  alpha: 1\n", ":1: lora: ", "appears twice"),
        ("lora:\n  rank: [8\n", ":3: ", "not valid YAML"),
        ("lora:\n\trank: 8\n", ":2: ", "not valid YAML"),
        ("model:\n  revision: 2026-13-45\n", ": ", "Quote the value"),  # looks like a date that does not exist
    ],
)
def test_a_mistake_in_the_file_is_one_problem(problems, tmp_path, text, place_key_value, remedy):
    (problem,) = problems(text)
    assert problem.startswith(f"{tmp_path}/settings.yaml{place_key_value}")
    assert remedy in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- lora\n", "not a mapping"),
        ("lora\n", "not a mapping"),
        ("!!set {lora}\n", "not a mapping"),
    ],
)
def test_a_file_without_sections_is_one_problem_with_a_file_to_start_from(problems, text, reason):
    (problem,) = problems(text)
    assert problem.startswith("--config: ") and reason in problem and "configs/tiny.yaml" in problem


def test_a_missing_file_is_one_problem_with_a_file_to_start_from(tmp_path):
    with pytest.raises(UserError, match=r"^--config: .*nowhere\.yaml: does not exist\. Start from config\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


HUGE = ["9" * 400, "-" + "9" * 400, "0x" + "f" * 6000, ".inf", ".nan", "1.0e+38"]


@pytest.mark.parametrize("value", HUGE)
def test_a_number_out_of_range_is_one_short_line_in_every_key(value):
    for key, default in ((key, default) for section in Config().model_dump().items() for key, default in named(section)):
        if isinstance(default, int | float) and not isinstance(default, bool):
            with pytest.raises(UserError) as error:
                override(Config(), parse_set([f"{key}={value}"]))
            assert len(error.value.lines) == 1 and key in error.value.lines[0] and len(error.value.lines[0]) < 300


def named(section):
    return [(f"{section[0]}.{key}", value) for key, value in section[1].items()]


@pytest.mark.parametrize("name", ["~nosuchuser/c.yaml", "a\0.yaml", "n" * 300, "/dev/zero", "/dev/null"])
def test_a_path_that_holds_no_file_of_settings_is_one_problem(name):
    with pytest.raises(UserError, match=r"^--config: ") as error:
        load_config(Path(name))
    assert len(error.value.lines) == 1


def test_a_file_that_is_not_text_is_one_problem(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    for unreadable in (path, tmp_path):
        with pytest.raises(UserError, match="cannot be read as text"):
            load_config(unreadable)


def test_a_byte_order_mark_does_not_change_the_first_key(load):
    assert load("\ufefflora:\n  rank: 3\n").lora.rank == 3


def test_a_mistake_on_the_command_line_says_so(problems):
    (problem,) = problems("lora:\n  rank: 8\n", {"lora.rank": "many"})
    assert problem.startswith("command line: lora.rank: 'many': ") and "the default: 16" in problem


def test_a_problem_carries_its_place_key_value_problem_and_remedy(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load("lora:\n  alpha: high\n")
    remedy = "correct it, or use the default: 32.0"
    expected = Problem("lora.alpha", "'high'", "should be a valid number", remedy, f"{tmp_path}/settings.yaml:2")
    assert caught.value.problems == [expected]


def test_override_reports_mistakes_like_load_config():
    with pytest.raises(UserError, match=r"command line: generation.top_p: '0': .*the default: 0\.9"):
        override(Config(), {"generation.top_p": "0"})


CONTRADICTIONS = [
    (
        {"performance.micro_batch": 3},
        "performance.micro_batch: 3: does not divide the effective batch of 16",
        "Use a divisor, or auto.",
    ),
    ({"training.device": "cpu", "performance.vram_limit_gib": 8}, "performance.vram_limit_gib: 8.0: contradicts", "to null"),
    ({"training.early_stopping_patience": 2, "data.eval_split": None}, "training.early_stopping_patience: 2: ", "a fraction"),
    ({"training.early_stopping_patience": 2, "training.save_steps": 150}, "training.save_steps: 150: ", "a multiple of"),
    ({"training.keep_best": True, "data.eval_split": None}, "training.keep_best: true: ", "a fraction"),
    ({"training.keep_best": True, "training.save_steps": 150}, "training.save_steps: 150: ", "a multiple of"),
]


@pytest.mark.parametrize(("values", "start", "remedy"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(problems, values, start, remedy):
    (problem,) = problems("lora:\n  rank: 8\n", values)
    assert problem.startswith(start) and remedy in problem


@pytest.mark.parametrize("values", [case[0] for case in CONTRADICTIONS[1:]])
def test_each_half_of_a_contradiction_is_fine_alone(load, values):
    for key, value in values.items():
        load("lora:\n  rank: 8\n", {key: value})


def test_all_mistakes_are_reported_at_once(problems):
    text = "lora:\n  r: 8\n  alpha: high\nlorra: {}\ntraining:\n  seed: -1\n  device: cpu\nperformance:\n  vram_limit_gib: 8\n"
    lines = problems(text, {"lora.dropout": 1})
    expected = ["lora.r:", "lora.alpha:", "lorra:", "training.seed:", "performance.vram_limit_gib:", "lora.dropout:"]
    assert len(lines) == len(expected)
    for key in expected:
        assert sum(f"{key} " in line for line in lines) == 1


def test_a_wrong_value_is_not_reported_as_a_contradiction_as_well(problems):
    (problem,) = problems("performance:\n  micro_batch: 3\ntraining:\n  batch_size: 0\n")
    assert "training.batch_size" in problem


def test_set_reads_the_value_as_yaml():
    assert parse_set(["a.b=8", "c.d = [x, y]", "e.f=null", "g.h=k=v", "i.j="]) == {
        "a.b": 8,
        "c.d": ["x", "y"],
        "e.f": None,
        "g.h": "k=v",
        "i.j": None,
    }


@pytest.mark.parametrize(
    ("assignment", "words"), [("lora.rank", "KEY=VALUE"), ("a.b=[1", "not valid YAML"), ("a.b=2026-13-45", "not valid YAML")]
)
def test_set_without_a_usable_value_is_one_problem(assignment, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_set([assignment])
    assert caught.value.lines[0].startswith(f"--set: {assignment}: ")


def test_hyphens_mean_underscores_in_flags_and_stay_in_values():
    config = from_command_line("--max-length", "64", "--output-dir=my-run", "--model-name", "my-org/my-model")
    assert config.data.max_length == 64
    assert config.training.output_dir == "my-run"
    assert config.model.name == "my-org/my-model"


@pytest.mark.parametrize("flag", ["--learnin_rate", "--learnin-rate", "--learnin_rate=1"])
def test_an_unknown_flag_is_one_line_with_the_closest(capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        train_qlora.parse_arguments([flag])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --learnin_rate") and "did you mean --learning_rate?" in line


def test_the_command_reports_a_mistake_in_one_line_with_status_2(root):
    command = [sys.executable, "train_qlora.py", "--rank", "0"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "lora.rank" in line


MISTAKES = [["--rank", "0"], ["--model_name", "./no-such-model"], ["--dataset", "no-such.txt"]]


def test_a_mistake_is_reported_before_torch_is_imported(root, tmp_path):
    code = f"""
import sys, train_qlora
from qlora_kit.errors import UserError
for mistake in {MISTAKES!r}:
    try:
        train_qlora.main(mistake + ["--output_dir", {str(tmp_path / "out")!r}])
    except UserError:
        print(sorted({{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["[]"] * len(MISTAKES), result.stderr


def test_the_data_set_may_be_a_list():
    config = override(Config(), {"data.dataset": ["a.txt", "b.jsonl"]})
    assert config.data.names == ["a.txt", "b.jsonl"] and Config().data.names == ["Salesforce/wikitext"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("data.dataset", [], "should be a Hub name, a file, a folder, or a list of them"),
        ("data.dataset", ["a.txt", 7], "should be a Hub name, a file, a folder, or a list of them"),
        ("data.format", "chatml", "should be 'auto', 'text', 'alpaca', 'sharegpt', 'messages', 'completion' or 'instruction'"),
        ("data.train_on", "user", "should be 'assistant', 'last' or 'all'"),
        ("data.too_long", "truncate", "should be 'cut' or 'drop'"),
        ("data.packing", "sometimes", "should be true, false or auto"),
    ],
)
def test_a_wrong_value_of_a_data_key_is_one_problem(key, value, reason):
    with pytest.raises(UserError) as caught:
        override(Config(), {key: value})
    (problem,) = caught.value.lines
    assert f"{key}: {value!r}: {reason}" in problem
