"""What a shell and other programs need: `dagrelay completion` and `dagrelay schema`."""

from __future__ import annotations

import json

import click
from click.shell_completion import get_completion_class

from .exits import told


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes this command's words.

    \b
    bash:  dagrelay completion bash > ~/.local/share/bash-completion/completions/dagrelay
    zsh:   dagrelay completion zsh > a file `_dagrelay` in a folder of $fpath
    fish:  dagrelay completion fish > ~/.config/fish/completions/dagrelay.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"there is no completion for {shell}")
    name = "dagrelay"
    click.echo(made(context.find_root().command, {}, name, f"_{name}_complete".upper()).source())


@click.command()
@click.option("--asyncapi", is_flag=True, help="All doors with their messages, as an AsyncAPI 3.0 document.")
@told
def schema(asyncapi: bool) -> None:
    """Print the JSON Schema of the messages, for publishers in other languages."""
    from . import message_docs  # only here: it looks through the whole contract

    found = message_docs.asyncapi() if asyncapi else message_docs.message_schema()
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
