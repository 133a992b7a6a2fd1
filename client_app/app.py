"""The Flower ClientApp: every message is an order that federation/site.py carries out."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.federation.site import answer, new_runtime

app = ClientApp()
# One a process: in simulation a process is many sites, in deployment Flower starts one for each message.
runtime = new_runtime()


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Say who this site is and what data it has."""
    return answer(message, context, runtime)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Test the module that came, train it, send the delta."""
    return answer(message, context, runtime)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the module that came."""
    return answer(message, context, runtime)
