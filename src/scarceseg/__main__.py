"""``python -m scarceseg``, which is what ``torchrun -m scarceseg`` starts in every process."""

from scarceseg.cli import main

if __name__ == "__main__":
    main()
