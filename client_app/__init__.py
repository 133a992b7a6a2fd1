"""fedsplit's Flower ClientApp. The bundle carries it alone; fedsplit itself is the machine's own."""

from importlib.util import find_spec

if find_spec("fedsplit") is None:
    raise ModuleNotFoundError(
        "fedsplit is not installed in the Python that runs this app: install it there, and set "
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1, so that Flower makes no environment without it"
    )
