"""The command of docs/scale.md that serves on Ray, run as it stands; port 8000 gives way where it is taken."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import pytest

from documented_commands import blocks, words_of
from metier import embedded
from serving.on_ray.server_process import ServerProcess

pytest.importorskip("ray")

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
PORT = 8000


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_serves_each_model_on_two_replicas(tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").split("\n## Serving on Ray Serve\n")[1].split("\n## ")[0]
    ((line,),) = [block.splitlines() for block in blocks(section)]
    command = shlex.join(words_of(line))
    server = ServerProcess([] if is_free(PORT) else ["--port", 0], tmp_path / "log", command=command)
    try:
        assert len(server.replicas()) == 2
        names = [model.id for model in server.openai.models.list()]
        assert names == ["embedded", "synopsis", "translate"]
        for task in names[1:]:
            question = json.loads(embedded.task_path(task, "test").read_text().splitlines()[0])["messages"][:1]
            texts = {
                server.openai.chat.completions.create(model=name, messages=question, max_tokens=24, temperature=0)
                .choices[0]
                .message.content
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
