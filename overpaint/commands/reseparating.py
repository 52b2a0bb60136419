"""`overpaint recipe reseparate`: patches of one universe again, after concepts joined."""

from __future__ import annotations

import click

from overpaint.commands.common import Talk, device_option, show_change, why_option, workshop
from overpaint.commands.interrupting import interruptible


@click.command("reseparate")
@click.argument("name", default="default")
@why_option
@device_option
@click.pass_context
def recipe_reseparate(ctx: click.Context, name: str, why: str, device: str) -> None:
    """Solve the closed-form patches of a recipe again for all concepts known now, and exchange them in one revision."""
    talk = Talk()
    with interruptible(talk, lambda: f"the recipe {name!r} is as it was; run the same command again"):
        done = workshop(ctx).reseparate(name, device=device, why=why, report=talk.progress)
    talk.clear()
    for line in done.lines:
        show_change(line)
    if done.lines:
        count = len(done.lines) // 2
        click.echo(f"{count} patch{'' if count == 1 else 'es'} re-separated for {done.concepts} concepts")
    else:
        click.echo(f"nothing to do: what can be re-separated was solved for the {done.concepts} concepts known now")
    if done.left:
        names = ", ".join(f"{record.concept} ({record.solver})" for record in done.left)
        talk.say(f"left as they are, because their solvers need time: {names}; solve them again if they disturb others")
