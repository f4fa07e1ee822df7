"""The program's entry: `llamacli`, or `python -m llamacli`."""

from time import perf_counter

STARTED = perf_counter()  # before anything is imported: the timings of --json count from here


def main() -> None:
    try:
        from llamacli.commands.app import door

        door(STARTED)
    except KeyboardInterrupt:  # while importing
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
