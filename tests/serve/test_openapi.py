"""The OpenAPI document against the service: schemathesis with all its checks finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.serve.asgi import create_app, openapi_document
from rayemb.serve.config import ServeConfig
from rayemb.serve.local import LocalEngine
from tests.serve.live import listening

CONFIG = Path(__file__).with_name("schemathesis.toml")
# Every check of schemathesis in every phase, examples that do not change from run to run.
CHECKS = ("--checks=all", "--mode=all", "--max-examples=20", "--generation-deterministic", "--no-color")


def test_every_answer_is_as_described(local: LocalEngine, config: ServeConfig, tmp_path: Path) -> None:
    # As a command: schemathesis' plugin does not work with this pytest. In a folder of its own, where it keeps files.
    with listening(create_app(local, config)) as url:
        program = str(Path(sys.executable).with_name("schemathesis"))
        command = [program, f"--config-file={CONFIG}", "run", *CHECKS, f"{url}/openapi.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout, done.stdout[-6000:]


def test_the_document_is_published_as_a_file(tmp_path: Path, local: LocalEngine) -> None:
    done = CliRunner().invoke(app, ["serve", "openapi", "serve.max_k=77", "--out", str(tmp_path / "openapi.json")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "openapi.json").read_text())
    config = ServeConfig(max_k=77)
    live = json.loads(json.dumps(create_app(local, config).openapi()))
    assert set(live["paths"]) == set(document["paths"])
    assert document == json.loads(json.dumps(openapi_document(config)))
    body = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["k"]["maximum"] == 77
