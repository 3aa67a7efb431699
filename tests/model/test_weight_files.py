"""Headers and indexes that anyone may have written, and the files beside them."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import fetch_weights
from qlora_kit.model.weight_files import INDEX, WHOLE, read_header, weight_files

TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path, header, size=16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


def test_headers_of_the_library_are_read(tmp_path):
    tensors = {
        "b": torch.zeros(3, 2),
        "a": torch.zeros(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: stored.shape for name, stored in header.items()} == {name: tuple(one.shape) for name, one in tensors.items()}
    assert torch.equal(header["one"].read(), tensors["one"])


@pytest.mark.parametrize(
    "header",
    [
        *(b"[" * 100_000, b"[]", b"{", b"\xff"),
        *({"a": entry} for entry in (None, [], {}, TENSOR | {"shape": 4})),
        *({"a": TENSOR | {"shape": shape}} for shape in ([2], [-2, -2], [2.0, 2], [2**40, 2**40], [True, 4], [[2, 2]])),
        *({"a": TENSOR | {"data_offsets": place}} for place in ([0], [16, 0], [4, 20], [0, 10**30], [-16, 0], "ab", None)),
        *({"a": TENSOR | {"dtype": dtype}} for dtype in (5, None, "F16")),
        {"a": TENSOR, "b": TENSOR},  # one over the other
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, header):
    with pytest.raises(ValueError):
        read_header(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "index",
    [
        *({"weight_map": names} for names in (None, [], {}, {"a": 5}, {"a": "/dev/zero"}, {"a": "../x.safetensors"})),
        *({"weight_map": {"a": name}} for name in ("/x.safetensors", "b/../../x.safetensors", "", "pytorch_model.bin")),
        {},
    ],
    ids=str,
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, index):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json") as error:
        weight_files(tmp_path)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize("file", [WHOLE, "generation_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_opened(tmp_path, file, kind):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / WHOLE, {"a": TENSOR})
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file) if kind == "pipe" else (tmp_path / file).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        fetch_weights(ModelSettings(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", b"[" * 100_000, "nested too deep"),
        ("special_tokens_map.json", b"[]", "no JSON object"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "states eos_token_id"),
        ("tokenizer.json", b"[" + b"{}," * 2**22 + b"{}]", "more than 4,194,304 lists and objects"),
        ("chat_template.jinja", b" " * (2**20 + 1), "more than 1,048,576 bytes"),
        ("adapter_config.json", b"{}", "holds an adapter_config.json"),
    ],
)
def test_a_file_that_would_take_memory_or_mislead_the_library_is_refused(tmp_path, file, content, reason):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / WHOLE, {"a": TENSOR})
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        fetch_weights(ModelSettings(name=str(tmp_path)))
    assert error.value.lines[0].startswith(f"model.name: {tmp_path}: ")
