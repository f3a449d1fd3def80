"""The command of docs/scale.md that serves on Ray, run as it stands; port 8000 gives way where it is taken."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from serving.on_ray.server_process import ServerProcess

pytest.importorskip("ray")

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
PORT = 8000


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_serves_each_model_on_two_replicas(tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").split("\n## Serving on Ray Serve\n")[1].split("\n## ")[0]
    ((command,),) = [block.splitlines() for block in re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)]
    assert shutil.which(command.split()[0]) is not None
    server = ServerProcess([] if is_free(PORT) else ["--port", 0], tmp_path / "log", command=command)
    try:
        assert len(server.replicas()) == 2
        names = [model.id for model in server.openai.models.list()]
        assert names == ["embedded", "synopsis", "translate"]
        texts = {
            server.openai.completions.create(model=name, prompt="A library for", max_tokens=8, temperature=0)
            .choices[0]
            .text
            for name in names
        }
        assert len(texts) == 3
        assert server.stop() == 0
    finally:
        server.kill()


def is_free(port: int) -> bool:
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
