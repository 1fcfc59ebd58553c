from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmrec.data.columns import encode_ids, instant_seconds, read_timestamps, require_columns
from llmrec.errors import DataError


def ids(values):
    encoded = encode_ids(values, "item ID")
    names = encoded.ids.to_pylist()
    assert len(set(names)) == len(names)
    return [None if code < 0 else names[code] for code in encoded.codes]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], ["b", "a", "b"]),
        ([10, 2], ["10", "2"]),
        (np.array([3, 255], np.uint8), ["3", "255"]),
        (pa.array([2**60]), [str(2**60)]),
        ([1, "1", 1.0, None, float("nan")], ["1", "1", "1", None, None]),
        ([1.5, "a"], ["1.5", "a"]),
        (np.array([1.0, np.nan, 2.0]), ["1", None, "2"]),
        (pd.Series([1, None, 2]), ["1", None, "2"]),
        (pd.Series([1, None], dtype="Int64"), ["1", None]),
        (pd.Series(["x", "y", "x"]).astype("category"), ["x", "y", "x"]),
        (pa.chunked_array([["a"], ["b", "a"]]), ["a", "b", "a"]),
        (pa.chunked_array([["a"], ["b", "a"]]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        ([" a", "a ", "\ta"], ["a", "a", "a"]),
        (["", " ", "nan", "None", "null", "<NA>", "NA"], [None] * 6 + ["NA"]),
        (["1.0", "", "2", "2.0"], ["1", None, "2", "2"]),  # integers that a missing value made floats, as CSV
        (["1.0", "x"], ["1.0", "x"]),  # no column of numbers: left alone
        (["007", "7"], ["007", "7"]),
        ([None, None], [None, None]),
        (pa.chunked_array([], pa.string()), []),
        ([], []),
    ],
)
def test_ids_become_strings(values, expected):
    assert ids(values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.5, 2.0], "holds the number 1.5"),
        ([float("inf"), 1.0], "holds the number inf"),
        ([2.0**60], "only whole numbers up to"),
        ([True, False], "of type bool"),
        ([{}, "a"], "of type dict"),
        ([b"a"], "of type binary"),
        (["a\0b"], "NUL character.*utf-16"),
    ],
)
def test_what_can_be_no_id_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        encode_ids(values, "item ID")


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([5, 3], [5, 3]),
        ([1_500_000_000, -5], [1_500_000_000, -5]),
        ([1_500_000_000_999, 0], [1_500_000_000, 0]),
        ([1_500_000_000_999_999], [1_500_000_000]),
        ([1_500_000_000_999_999_999], [1_500_000_000]),
        ([1.9, -0.5], [1, -1]),
        (["12", "3"], [12, 3]),
        (["12.5", "3"], [12, 3]),
        (["1970-01-02", "1970-01-01T00:00:07Z", "1970-01-01 02:00:00+02:00"], [86400, 7, 0]),
        (["1970-01-01T00:00:07.999"], [7]),
        (pa.array([1, 2], pa.date32()), [86400, 172800]),
        (pa.array([1_999], pa.timestamp("ms")), [1]),
        (pa.array([1_999], pa.timestamp("ns", "Europe/Berlin")), [0]),
        (pd.to_datetime(pd.Series(["1970-01-01T00:01:00"])), [60]),
    ],
)
def test_times_become_seconds(values, seconds):
    read = read_timestamps(values)
    assert read.seconds.dtype == np.int64
    np.testing.assert_array_equal(read.seconds, seconds)
    assert not read.missing.any()
    assert not read.unparsed.any()


def test_a_named_unit_is_not_guessed():
    np.testing.assert_array_equal(read_timestamps([5000, 999], "ms").seconds, [5, 0])
    with pytest.raises(DataError, match="timestamp_unit is 'minutes'"):
        read_timestamps([1], "minutes")


def test_order_is_finer_than_seconds():
    read = read_timestamps([1_500_000_000_002, 1_500_000_000_001])
    assert read.seconds[0] == read.seconds[1]
    assert read.order[0] > read.order[1]


def test_missing_and_unparsed_times_are_told_apart():
    read = read_timestamps(["2020-01-01", "2020-01-02", "2020-01-03", None, "", "03/04/2020"])
    assert read.missing.tolist() == [False, False, False, True, True, False]
    assert read.unparsed.tolist() == [False] * 5 + [True]
    read = read_timestamps(["1", "2", "x", ""])
    assert read.missing.tolist() == [False, False, False, True]
    assert read.unparsed.tolist() == [False, False, True, False]
    assert read_timestamps([1.0, float("nan"), float("inf")]).missing.tolist() == [False, True, True]


def test_mostly_unparsed_times_are_refused():
    with pytest.raises(DataError, match="2 of 3 timestamps don't parse, such as '03/04/2020'"):
        read_timestamps(["03/04/2020", "yesterday", "2020-01-01"])
    with pytest.raises(DataError, match="timestamp column is of type list"):
        read_timestamps([[1], [2]])


def test_instants():
    assert instant_seconds(7, "test_from") == 7.0
    assert instant_seconds("1970-01-02", "test_from") == 86400.0
    assert instant_seconds("1970-01-01T01:00:00+01:00", "test_from") == 0.0
    assert instant_seconds(datetime(1970, 1, 2), "test_from") == 86400.0
    assert instant_seconds(datetime(1970, 1, 2, tzinfo=UTC), "test_from") == 86400.0
    for value in ("soon", None, float("nan"), [1]):
        with pytest.raises(DataError, match="test_from is"):
            instant_seconds(value, "test_from")


def test_required_columns():
    require_columns(["a", "b"], ["b"], "x.csv")
    with pytest.raises(DataError, match=r"x.csv has no column 'c'; its columns are 'a', 'b'"):
        require_columns(["a", "b"], ["c"], "x.csv")
    with pytest.raises(DataError, match="'a' more than once"):
        require_columns(["a", "a"], ["a"], "x.csv")
