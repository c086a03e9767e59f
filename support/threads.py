"""How OpenMP's threads wait for one another. It reads this once, so it is set before torch is imported."""

import os


def wait_briefly():
    """Where other programs compute too, threads that spin while they wait keep one another from their cores.

    Whoever has set anything of OpenMP's knows better."""
    if not any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = "20000"
