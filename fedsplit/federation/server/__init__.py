"""The server's half of a run: roll call, rounds, orders, replies. No device loads it."""
