"""``python -m bsafusion``, and so ``torchrun -m bsafusion train ...``."""

from bsafusion.cli import main

main()
