"""What command lines say of an error."""

from torch.utils.data import DataLoader, IterableDataset

from internvl.console import exit_status
from internvl.rows.bad_rows import TooManyBadRowsError


class BrokenRows(IterableDataset):
    """Rows of which the first is refused."""

    def __iter__(self):
        try:
            raise OSError("a cause: of it")
        except OSError as error:
            raise TooManyBadRowsError("1 of 1 rows are broken:\nmend them.") from error


def test_an_error_of_a_worker_is_told_without_the_traceback_that_torch_wraps_around_it(capsys):
    assert exit_status(lambda: list(DataLoader(BrokenRows(), num_workers=1))) == 2
    assert capsys.readouterr().err == "error: 1 of 1 rows are broken: mend them.\n"


def test_an_error_that_only_begins_as_one_of_a_worker_is_told_whole(capsys):
    def fail():
        raise ValueError("Caught nothing: no fish.")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: Caught nothing: no fish.\n"
