"""run.json: where an adapter comes from."""

import hashlib
import json

from qlora_kit.output.provenance import write_provenance


def test_run_json_is_written_with_the_digest_of_its_adapter_and_no_other_file_is_left(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    write_provenance(tmp_path, {"seed": 1, "command": "größer"})
    digest = hashlib.sha256(b"weights").hexdigest()
    stated = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert stated == {"seed": 1, "command": "größer", "adapter_sha256": digest}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.safetensors", "run.json"]
