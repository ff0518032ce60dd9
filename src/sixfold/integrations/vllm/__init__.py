"""vLLM serves from a compressed cache: ``--attention-backend SIXFOLD_4BIT`` (docs/vllm.md)."""


def register() -> None:
    """Make Sixfold's attention backends known to vLLM; it changes nothing until one is selected.

    vLLM calls this in each of its processes (entry point ``vllm.general_plugins``), some of them
    several times.
    """
    from sixfold.integrations.vllm.selection import install

    install()
