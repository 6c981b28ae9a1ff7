"""The entry point of the command `wnn-jax`."""

from wnn_jax.lab.errors import check_extra, one_line_errors


def main() -> None:
    """Run what the command line names, if all packages that it needs are installed."""
    with one_line_errors():
        check_extra("lab")
        from wnn_jax.lab import commands

        commands.run()


if __name__ == "__main__":
    main()
