"""`launcher completion SHELL`: shell completion of commands, flags and names of replicas."""

from __future__ import annotations

import click

_INSTALL = {
    "bash": 'eval "$(launcher completion bash)"      # in ~/.bashrc',
    "zsh": 'eval "$(launcher completion zsh)"       # in ~/.zshrc, after compinit',
    "fish": "launcher completion fish > ~/.config/fish/completions/launcher.fish",
}


@click.command(epilog="\b\nTo install it:\n  " + "\n  ".join(_INSTALL.values()))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of bash, zsh or fish."""
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(ctx.find_root().command, {}, "launcher", "_LAUNCHER_COMPLETE").source())
