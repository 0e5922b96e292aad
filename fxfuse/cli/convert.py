import click
@click.command()
def convert() -> None:
    pass
