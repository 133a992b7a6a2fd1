"""A throwaway Flower app that sends arrays to every node and back, for stream_vs_messages.py. Text, written to a folder.

The ServerApp waits for the file `go-N`, makes one round (a message to each node, replies polled every 0.2 s as fedsplit itself
does, not every 3 s as Flower's send_and_receive), writes `done-N` with the seconds that took, and so on. So whoever
started it can measure something else between rounds.
"""

from __future__ import annotations

import json
from pathlib import Path

_PYPROJECT = """\
[project]
name = "fedsplit-echo"
version = "0.0.1"
dependencies = []
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedsplit"

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
"""

_CLIENT = """\
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""

_SERVER = """\
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

SETTINGS = json.loads(%r)
FOLDER = Path(SETTINGS["folder"])
app = ServerApp()


def one_round(grid, nodes, array):
    content = RecordDict({"h": ArrayRecord({"h": Array(array)})})
    waiting = set(grid.push_messages([Message(content, node, "train") for node in nodes]))
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.remove(reply.metadata.reply_to_message_id)
            assert not reply.has_error(), reply.error
            assert np.array_equal(reply.content["h"]["h"].numpy(), array)
        if waiting:
            time.sleep(SETTINGS["poll_s"])


@app.main()
def main(grid, context):
    array = np.random.default_rng(0).standard_normal(SETTINGS["shape"], dtype=np.float32)
    while len(nodes := list(grid.get_node_ids())) < SETTINGS["nodes"]:
        time.sleep(0.2)
    for number in range(SETTINGS["rounds"]):
        while not (FOLDER / f"go-{number}").exists():
            time.sleep(0.02)
        started = time.perf_counter()
        one_round(grid, nodes, array)
        partial = FOLDER / f"partial-{number}"
        partial.write_text(str(time.perf_counter() - started))
        partial.rename(FOLDER / f"done-{number}")
"""


def write_app(
    app: Path, *, folder: Path, nodes: int, rounds: int, shape: tuple[int, ...], poll_s: float = 0.2
) -> None:
    """Write the app to `app`; at work it talks to us through files in `folder`."""
    settings = {
        "folder": str(folder),
        "nodes": nodes,
        "rounds": rounds,
        "shape": shape,
        "poll_s": poll_s,
    }
    (app / "echo").mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PYPROJECT, encoding="utf-8")
    (app / "echo" / "__init__.py").write_text("", encoding="utf-8")
    (app / "echo" / "client.py").write_text(_CLIENT, encoding="utf-8")
    (app / "echo" / "server.py").write_text(_SERVER % json.dumps(settings), encoding="utf-8")
