"""What bad_inputs.py does to the files, settings and places of a sound run."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]

# Inputs that end with status 0, and why that is right. Each pattern is searched in the name of a trial.
ACCEPTED = {
    r"base/config\.json: \S+ is (gone|null)$": "the library's default stands for a missing key",
    r"base/config\.json: (\S+_window|attention_dropout|rms_norm_eps|tie_word_embeddings) is (zero|half|true)": "a sound value",
    r"base/config\.json: (quantization_config is empty object|text_config)": "it states nothing about this model",
    r"base/config\.json: rope_(scaling|parameters) is empty object": "it states nothing",
    r"base/(generation_config|special_tokens_map)\.json: (gone|a link|the whole is empty object)": "it need not be there",
    r"base/generation_config\.json: (temperature|max_length) ": "answers take this toolkit's settings",
    r"base/generation_config\.json: (eos|pad)_token_id is (null|gone|zero|minus one|list|empty list)": "a token, or none",
    r"base/special_tokens_map\.json: additional_special_tokens ": "ids and ends stay those of tokenizer.json",
    r"base/tokenizer_config\.json: chat_template ": "chat_template.jinja takes its place",
    r"base/tokenizer_config\.json: (eos|pad)_token ": "special_tokens_map.json takes its place",
    r"(base|adapter)/tokenizer_config\.json: tokenizer_class ": "the tokenizer is that of tokenizer.json",
    r"adapter/tokenizer_config\.json: (chat_template|pad_token|the whole is empty object)": (
        "chat_template.jinja and run.json take their places"
    ),
    r"base/special_tokens_map\.json: pad_token ": "padding is masked, and never read",
    r"base/config\.json: auto_map is empty object": "it states nothing",
    r"base/model\.safetensors: a tensor of 1e\+30": "a finite number is a weight",
    r"train --output_dir: the data folder": "it holds the file that is trained on, and may hold more",
    r"resume --resume: checkpoints of a run": "a folder with checkpoints of this run is a way to name them",
    r"base/tokenizer_config\.json: model_max_length is (1e30|400 digits|infinity|gone|null)": "no end, which is sound",
    r"base/tokenizer\.json: (added_tokens is empty|model/merges is empty|(pre_tokenizer|post_processor) is )": (
        "a tokenizer that splits otherwise"
    ),
    r"chat: base/chat_template\.jinja: (empty|gone)": "a model without a template gets lines of User and Assistant",
    r"=1\.5$|=0$|=null$|=1e-400$": "a sound value: 1e-400 is 0",
    r"--model_name: the base model": "it is one",
    r"index\.json: metadata": "the library reads the map alone",
    r"plan: base/config\.json: (eos_token_id|auto_map|hidden_act|rope_\w+) ": "a plan does not depend on it",
    r"config\.json: .*(architectures|transformers_version|initializer_range|use_cache|dtype|max_window_layers|layer_types)": (
        "the run does not depend on it"
    ),
    r"adapter_config\.json: (auto_mapping|eva_config|loftq_config|megatron_core|later_key|lora_dropout|inference_mode) ": (
        "a key of other tools, or of how the matrices began, is left out"
    ),
    r"adapter/(adapter_config|run)\.json: \S+ is (null|gone|empty (list|object|text))$": "a missing key stands for its default",
    r"adapter_config\.json: (base_model_name_or_path|revision) ": "run.json names the base model",
    r"adapter_config\.json: (lora_alpha is (minus one|zero|half)|(fan_in_fan_out|use_rslora) is true)": (
        "any scale is one; peft turns it back"
    ),
    r"adapter_config\.json: init_lora_weights is true": "it says how the matrices began",
    r"adapter_config\.json: ((rank|alpha)_pattern is object|exclude_modules is)": "it matches none of the modules",
    r"merge: adapter/adapter_config\.json: (target_|layers_|task_type)": "the tensors' names say what is adapted",
    r"run\.json: (perplexity|config|base_commit|base_model/(revision|folder|name)|data is object|stop_ids is list$)": (
        "it describes the run, and nothing is computed with it"
    ),
    r"adapter/run\.json: quantization/load_in_4bit is true": "it is so",
    r"manifest\.json: run/(plan_inputs is object|recomputed is zero)": "with other inputs the run is planned again",
    r"manifest\.json: files/manifest\.json is gone": "the list does not hold itself",
    r"plan: base/config\.json: rope_parameters/factor": "a plan does not depend on it",
    r"infer: adapter/config\.yaml: (gone|empty|a folder of everything)": "it holds defaults; no data are opened",
    r"infer: adapter/chat_template\.jinja: ": "an adapter trained on text renders none",
}
DEEP = 100_000
VALUES: dict[str, Any] = {
    "null": None, "true": True, "minus one": -1, "zero": 0, "half": 0.5, "1e30": 10**30, "400 digits": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"), "empty text": "", "text": "x", "escape codes": "a\n\x1b[31mred\x1b]0;title\x07",
    "surrogate": "\ud800",
    "empty list": [], "list": [1], "list of lists": [[0, 4]], "empty object": {}, "object": {"a": 1}, "long text": "y" * 2**20,
    "path": "../../etc/passwd", "device": "/dev/zero", "module": "megatron.payload", "endless pattern": "((a|[a-z_.0-9])+)+!",
    "open bracket": "((",
}  # fmt: skip
PAYLOAD = "import os\nopen(os.environ['CANARY'], 'w').close()\n"


def damaged_files(file: str) -> Iterator[tuple[str, Damage]]:
    """Yield ways to damage a file, by its kind."""
    yield from _damaged_bytes(file)
    if file.endswith(".json"):
        yield from _damaged_json(file)
    elif file.endswith(".safetensors"):
        yield from _damaged_tensors(file)
    elif file.endswith(".jinja"):
        yield from ((name, _write(file, text)) for name, text in TEMPLATES.items())
    elif file.endswith(".yaml"):
        yield from ((name, _write(file, text)) for name, text in YAML.items())


def _write(file: str, content: str | bytes) -> Damage:
    def damage(place: Path) -> None:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (place / file).write_bytes(data.replace(b"PLACE", os.fsencode(place)))

    return damage


def _replace(file: str, change: Callable[[Path], None]) -> Damage:
    def damage(place: Path) -> None:
        (place / file).unlink()
        change(place / file)

    return damage


def _damaged_bytes(file: str) -> Iterator[tuple[str, Damage]]:
    def cut(place: Path) -> None:
        content = (place / file).read_bytes()
        (place / file).write_bytes(content[: len(content) // 2])

    def zeros(place: Path) -> None:
        (place / file).write_bytes(bytes((place / file).stat().st_size))

    yield "cut in half", cut
    yield "zeros", zeros
    yield "empty", _write(file, b"")
    yield "gone", lambda place: (place / file).unlink()
    yield "random bytes", _write(file, hashlib.sha256(file.encode()).digest() * 100)
    yield "UTF-16", _write(file, '{"a": 1}'.encode("utf-16"))
    yield "a folder", _replace(file, Path.mkdir)
    yield "a pipe", _replace(file, os.mkfifo)
    yield "an endless device", _replace(file, lambda path: path.symlink_to("/dev/zero"))
    yield "a link to itself", _replace(file, lambda path: path.symlink_to(path.name))


def _damaged_json(file: str) -> Iterator[tuple[str, Damage]]:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        yield f"deep {opening}", _write(file, opening * DEEP)
        yield f"deep and closed {opening}", _write(file, opening * DEEP + "1" + closing * DEEP)
    for name, value in VALUES.items():
        yield f"the whole is {name}", _write(file, json.dumps(value))
    for path in KEYS[Path(file).name]:
        for name, value in VALUES.items():
            yield f"{path} is {name}", _set(file, path, value)
        yield f"{path} is gone", _set(file, path, None, remove=True)


def _set(file: str, path: str, value: Any, remove: bool = False) -> Damage:
    """Set one key, nested ones by a dotted path, and seal a manifest anew."""

    def damage(place: Path) -> None:
        content = json.loads((place / file).read_text(encoding="utf-8"))
        inner = content
        *parents, last = path.split("/")
        for parent in parents:
            if not isinstance(inner.setdefault(parent, {}), dict):
                inner[parent] = {}
            inner = inner[parent]
        inner.pop(last, None)
        if not remove:
            inner[last] = value
        if path.startswith("megatron"):
            (place / "adapter" / "payload.py").write_text(PAYLOAD)
        if "sha256" in content and file.endswith("manifest.json"):
            content.pop("sha256")
            content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (place / file).write_text(json.dumps(content), encoding="utf-8")

    return damage


KEYS = {
    "adapter_config.json": [
        "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "use_dora",
        "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "peft_type", "task_type", "auto_mapping",
        "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout", "inference_mode", "megatron_config",
        "megatron_core",
        "loftq_config", "layer_replication", "trainable_token_indices", "target_parameters", "arrow_config", "eva_config",
        "later_key",
    ],
    "run.json": [
        "base_model", "base_model/name", "base_model/folder", "base_model/revision", "trust_remote_code", "quantization",
        "quantization/quant_type", "quantization/load_in_4bit", "prompt_style", "stop_ids", "base_weights_sha256",
        "tokenizer_sha256",
        "vocabulary_sha256", "perplexity", "config", "data", "base_commit",
    ],
    "config.json": [
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
        "hidden_act", "tie_word_embeddings", "sliding_window", "use_sliding_window", "attention_dropout", "architectures",
        "quantization_config", "auto_map", "eos_token_id", "dtype", "layer_types", "text_config", "text_config/hidden_size",
        "rope_parameters/rope_theta", "rope_parameters/factor", "quantization_config/load_in_4bit",
    ],
    "model.safetensors.index.json": ["weight_map", "metadata", "metadata/total_size", "weight_map/model.norm.weight"],
    "special_tokens_map.json": ["eos_token", "pad_token", "additional_special_tokens"],
    "generation_config.json": ["eos_token_id", "pad_token_id", "temperature", "max_length"],
    "tokenizer_config.json": ["chat_template", "eos_token", "pad_token", "tokenizer_class", "auto_map", "model_max_length"],
    "tokenizer.json": ["model", "model/vocab", "model/merges", "model/type", "added_tokens", "pre_tokenizer", "post_processor"],
    "manifest.json": [
        "step", "number", "run", "files", "run/fingerprints", "run/prompt_style", "run/plan_inputs", "run/micro_batch",
        "run/recomputed", "run/processes", "files//dev/zero", "files/../../adapter_config.json", "files/manifest.json",
    ],
}  # fmt: skip

TEMPLATES = {
    "two loops of 99,999": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large power": "{{ 10 ** 10 ** 9 }}",
    "rounding to a large power": "{{ 1|round(-99999999999) }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a long text": "{{ 'a' * 9000000000 }}",
    "doubling": "{% set ns = namespace(a='ab') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "padding": "{{ 'a'.ljust(9000000000) }}",
    "indent": "{{ 'a\nb'|indent(2000000000) }}",
    "division by zero": "{{ 1 / 0 }}",
    "a wrong type": "{{ 1 + 'a' }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an attribute": "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "nothing": "{# nothing #}",
    "an undefined name": "{{ nobody.knows }}",
    "not closed": "{% for m in messages %}",
    "escape codes": "{{ raise_exception('a\n\x1b[31mred\x1b]0;title\x07') }}",
    "no control token": "{% for m in messages %}{{ m.content }} {% endfor %}",
}
YAML = {
    "a program": "!!python/object/apply:os.system ['touch PLACE/CODE-OF-AN-INPUT-RAN']",
    "a bomb": "a: &a [x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi")),
    "deep": "[" * 10_000,
    "a list": "- 1\n- 2\n",
    "an unknown key": "data:\n  nonsense: 1\n",
    "escape codes": 'data:\n  "a\\e[31m": 1\n',
    "a folder of everything": "data:\n  dataset: /\n",
}  # fmt: skip


def _damaged_tensors(file: str) -> Iterator[tuple[str, Damage]]:
    def header(name: str, text: bytes, length: int | None = None) -> tuple[str, Damage]:
        return f"header: {name}", _write(file, struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))

    yield header("deep", b"[" * DEEP)
    yield header("longer than the file", b"{}", 10**6)
    yield header("100 MB", b"{}", 10**8)
    yield header("2**63", b"{}", 2**63)
    yield header("many empty objects", b"[" + b"{}," * 2**22 + b"{}]")
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for key in tensor:
        for name, value in VALUES.items():
            yield header(f"{key} is {name}", json.dumps({"a.weight": tensor | {key: value}}).encode())
    yield header("a huge shape", json.dumps({"a": tensor | {"shape": [2**40, 2**40]}}).encode())
    yield header("shapes of four dimensions", json.dumps({"a": tensor | {"shape": [1] * 4}}).encode())
    for name, value in VALUES.items():
        yield header(f"the tensor is {name}", json.dumps({"a.weight": value}).encode())
    for number in (float("nan"), float("inf"), 1e30):
        yield f"a tensor of {number}", _fill(file, number)


def _fill(file: str, number: float) -> Damage:
    """Fill the first tensor of a file with a number."""

    def damage(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(place / file)
        tensors[next(iter(tensors))].fill_(number)
        save_file(tensors, place / file, {"format": "pt"})

    return damage


RECORDS = {
    "deep list": "[" * DEEP,
    "deep object": '{"instruction":' * DEEP,
    "not JSON": "{'instruction': 'x'}",
    "a number": "5",
    "null": "null",
    "no known key": '{"a": 1}',
    "NaN": '{"instruction": NaN, "output": "x"}',
    "a list as answer": '{"instruction": "x", "output": ["y"]}',
    "an empty answer": '{"instruction": "x", "output": ""}',
    "a surrogate": '{"instruction": "x", "output": "\\ud83d"}',
    "NUL": '{"instruction": "x", "output": "\\u0000"}',
    "escape codes in a key": '{"\\u001b[31m": "x"}',
    "400 digits": '{"instruction": "x", "output": ' + "9" * 5000 + "}",
    "a word of 3 MB": json.dumps({"instruction": "x", "output": "y" * 3_000_000}),
    "a line of 20 MB": json.dumps({"instruction": "x", "output": "y " * 10_000_000}),
    "a wrong weight": '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": "a"}]}',
    "a key twice": '{"instruction": "x", "output": "y", "output": "z"}',
    "turns in a wrong order": '{"messages": [{"role": "assistant", "content": "x"}]}',
    "an unknown role": '{"messages": [{"role": "\\u001b[31m", "content": "x"}]}',
    "tools that are no list": '{"instruction": "x", "output": "y", "tools": 5}',
}
TEXTS = {
    "a word of 60 MB behind a title": " = Title = \n" + "x" * 60_000_000,
    "a word of 3 MB": "x" * 3_000_000,
    "NUL": "a\0b",
    "Latin-1": b"caf\xe9 " * 10,
    "spaces": " \n" * 1000,
    "one word": "word",
}
TABLES = {
    "a column twice": "text,text\na,b\n",
    "an open quote": 'text\n"a\n',
    "more fields than columns": "text\na,b,c\n",
    "no text column": "a,b\n1,2\n",
    "NUL": "text\na\0\n",
    "a field of 20 MB": "text\n" + "x " * 10_000_000 + "\n",
    "escape codes in the header": "\x1b[31m,b\n1,2\n",
}


def damaged_data() -> Iterator[tuple[str, str, Damage]]:
    """Yield the file, what is done to it, and how."""
    for suffix in ("jsonl", "json"):
        for name, text in RECORDS.items():
            yield f"bad.{suffix}", name, _write(f"data/bad.{suffix}", text)
            sound = '{"instruction": "x", "output": "y"}\n'
            yield f"late.{suffix}", f"{name}, in record 3", _write(f"data/late.{suffix}", sound * 2 + text)
    for name, content in TEXTS.items():
        yield "bad.txt", name, _write("data/bad.txt", content)
    for name, content in TABLES.items():
        yield "bad.csv", name, _write("data/bad.csv", content)
    for name, damage in _damaged_bytes("data/articles.txt"):
        yield "articles.txt", name, damage
    for name, damage in _damaged_bytes("data/alpaca.jsonl"):
        yield "alpaca.jsonl", name, damage
    yield from (("bad.parquet", name, damage) for name, damage in _damaged_parquet())


def _damaged_parquet() -> Iterator[tuple[str, Damage]]:
    def table(columns: dict[str, Any]) -> Damage:
        def damage(place: Path) -> None:
            import pyarrow
            from pyarrow.parquet import write_table

            write_table(pyarrow.table(columns), place / "data" / "bad.parquet", compression="zstd")

        return damage

    yield "one row of 200 MB", table({"text": ["x " * 10**8]})
    yield "a row of 20 MB", table({"text": ["x " * 10**7]})
    yield "numbers", table({"text": [1, 2]})
    yield "no row", table({"text": []})
    yield "another column", table({"\x1b[31mred": ["x"]})
    yield "random bytes", _write("data/bad.parquet", b"PAR1" + bytes(range(256)) * 10 + b"PAR1")
    yield "deep lists", table({"messages": [[[["x"]]]]})


NUMBERS = ("-1", "0", "1e38", "1e-400", "9" * 400, "0x" + "f" * 6000, "nan", "inf", "true", "null", "[]", "x", "1.5", "\x1b[31m")
NUMERIC_KEYS = (
    "lora.rank", "lora.alpha", "lora.dropout", "data.max_length", "data.max_train_samples", "training.num_epochs",
    "training.max_steps",
    "training.batch_size", "training.gradient_accumulation_steps", "training.learning_rate", "training.warmup_ratio",
    "training.weight_decay", "training.max_grad_norm", "training.save_steps", "training.seed", "performance.micro_batch",
    "performance.vram_limit_gib", "generation.temperature",
)  # fmt: skip
PLACES = {
    "a file": "{place}/base/config.json", "below a file": "{place}/base/config.json/x",
    "a name of 300 bytes": "{place}/" + "n" * 300,
    "an unknown user": "~nosuchuser/x", "NUL": "{place}/a\0b", "a device": "/dev/null", "the root": "/", "proc": "/proc/x",
    "the base model": "{place}/base", "the data folder": "{place}/data", "checkpoints of a run": "{place}/adapter/checkpoints",
    "a link to nothing": "{place}/dangling", "a link to itself": "{place}/loop", "not to be searched": "{place}/closed/x",
    "escape codes": "{place}/\x1b[31m",
}  # fmt: skip
FLAGS_OF_PLACES = (
    ("plan", "--model_name"), ("train", "--model_name"), ("train", "--dataset"), ("train", "--output_dir"), ("train", "--config"),
    ("resume", "--resume"), ("infer", "--adapter"), ("infer", "--prompt_file"), ("infer", "--perplexity"), ("merge", "--adapter"),
    ("merge", "--output"), ("merge", "--check"),
)  # fmt: skip


def damaged_settings() -> Iterator[tuple[str, list[str], Damage]]:
    """Yield a name, the command with more flags, and what is done before."""
    for key in NUMERIC_KEYS:
        for number in NUMBERS:
            yield (
                f"{key}={number[:10]}",
                ["train" if key != "performance.vram_limit_gib" else "plan", "--set", f"{key}={number}"],
                _links,
            )
    for command, flag in FLAGS_OF_PLACES:
        for name, path in PLACES.items():
            yield f"{command} {flag}: {name}", [command, flag, path], _links


def _links(place: Path) -> None:
    (place / "dangling").symlink_to("nothing")
    (place / "loop").symlink_to("loop")
    (place / "closed").mkdir(mode=0)
