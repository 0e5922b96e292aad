import click
@click.command()
def restore() -> None:
    pass
