"""Optional extras of this package, such as `plan`."""

from pathlib import Path


def install_command(extra: str) -> str:
    """Return the command that installs an extra: of the checkout, where the package runs from one."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():  # whose name need not be on a package index
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'qlora-jax[{extra}]'"
