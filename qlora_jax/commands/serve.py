"""`qlora-jax serve`: a server with OpenAI's API, of one base and its adapters."""

import dataclasses
import os
from collections.abc import Sequence

from qlora_jax.cli import command, flag, parse_flags, spellings
from qlora_jax.commands.serving_flags import ServedFlags, load, served_refusals
from qlora_jax.environment import keep_compiled_programs

DESCRIPTION = """Serve a base and adapters, each a model of OpenAI's API by its name (/v1/chat/completions,
/v1/completions, /v1/models; also /health and /metrics). Requests join a running batch at every token. A key that
clients must know is taken from the environment variable QLORA_JAX_API_KEY."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeFlags(ServedFlags):
    """Flags of `serve`."""

    host: str = flag("127.0.0.1", "Address to listen at; others than this machine reach 0.0.0.0.", group="server")
    port: int = flag(8000, "Port to listen at.", group="server")
    slots: int = flag(8, "Answers that are written at a time, each with room for --context tokens.", group="server")
    warm_up: bool = flag(True, "Compile what requests need before the first of them is answered.", group="server")
    queue: int = flag(64, "Requests that wait for a slot; what comes beyond is refused (429).", group="server")


def main(argv: Sequence[str], *, prog: str = "qlora-jax serve") -> int:
    """Load the model and serve it until a signal comes."""
    flags, _ = parse_flags(ServeFlags, argv, prog=prog, description=DESCRIPTION, check=served_refusals)
    with command(spellings(ServeFlags)):
        keep_compiled_programs(flags.compilation_cache, all_of_them=True)
        # Imported after that, and once the flags are known to be good: loading JAX takes seconds.
        from qlora_jax.serving.server import ServerConfig, listen, serve

        config = ServerConfig(
            engine=flags.engine_options(flags.slots),
            warm_up=flags.warm_up,
            queue=flags.queue,
            api_key=os.environ.get("QLORA_JAX_API_KEY"),
            host=flags.host,
            port=flags.port,
        )
        with listen(config) as listening:  # told before the model is loaded
            serve(load(flags), config, listening)
    return 0
