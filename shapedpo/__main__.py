"""`python -m shapedpo`, which is also what `accelerate launch -m shapedpo` and `torchrun -m shapedpo` run."""

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
