"""One whole training step of every method."""


def test_step(case, measure):
    measure(case)
