"""run.json: where an adapter comes from."""

import json

from qlora_kit.output.provenance import write_provenance


def test_run_json_is_written_and_no_other_file_is_left(tmp_path):
    write_provenance(tmp_path, {"seed": 1, "command": "größer"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"seed": 1, "command": "größer"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
