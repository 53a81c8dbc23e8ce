"""AWD's options as mergekit's parameters, and what is said where mergekit is missing: all that needs no mergekit."""

import importlib.metadata
import sys

import pytest

import awd_fast
from awd_fast import integrations
from awd_fast.errors import InputError, MissingPackage
from awd_fast.integrations import mergekit_options as options
from awd_fast.recipe import NAMES, make_recipe
from tests.test_cli import run


def version(monkeypatch, found):
    def installed(package):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(integrations, "version", installed)


@pytest.mark.parametrize("found", ["0.1.5", "0.1.10", "0.1.5.dev1"])
def test_versions_that_will_do(monkeypatch, found):
    version(monkeypatch, found)
    integrations.require("mergekit", "0.1.5", "0.2")


@pytest.mark.parametrize("found", ["0.1.4", "0.2.0", "0.2", "1", "nonsense"])
def test_other_versions_are_refused(monkeypatch, found):
    version(monkeypatch, found)
    with pytest.raises(
        MissingPackage,
        match=rf"mergekit {found} .* pip install 'awd_fast\[mergekit\]' brings mergekit>=0\.1\.5,<0\.2$",
    ):
        integrations.require("mergekit", "0.1.5", "0.2")


def test_the_command_says_how_to_install_mergekit(monkeypatch):
    version(monkeypatch, None)
    monkeypatch.delitem(sys.modules, "awd_fast.integrations.mergekit", raising=False)
    monkeypatch.delattr(integrations, "mergekit", raising=False)
    code, out, error = run("mergekit", "CONFIG.yml", "OUT", "--cuda", "--help")
    assert (code, out) == (2, "")
    assert error == (
        "awd-fast: mergekit is not installed; pip install 'awd_fast[mergekit]' brings mergekit>=0.1.5,<0.2\n"
    )


def test_a_missing_package_is_bad_input_and_an_import_error():
    assert issubclass(MissingPackage, InputError)
    assert issubclass(MissingPackage, ImportError)


def test_every_option_of_a_merge_has_a_parameter():
    elsewhere = {"method", "weights", "dtype", "device", "device_memory", "memory"}
    assert set(options.SHARED) == (set(NAMES) - elsewhere) | {"lambda"}


def test_defaults_are_those_of_a_merge():
    given = dict.fromkeys(options.SHARED)
    assert options.recipe_of("awd", given, [1.0, 1.0, 1.0]) == make_recipe(3)
    assert options.recipe_of("wudi", given, [1.0, 0.0, 1.0]) == make_recipe(3, method="wudi", weights=(1, 0, 1))


def test_values_are_those_of_yaml():
    given = {"lambda": 0.5, "groups": "column", "optimizer": "adam", "betas": "0.8 0.9", "exclude": "*bias  *norm*"}
    expected = make_recipe(
        2, scale=0.5, groups="column", optimizer="adam", betas=(0.8, 0.9), exclude=("*bias", "*norm*"), dtype="float16"
    )
    assert options.recipe_of("awd", given, [1, 1], dtype="float16") == expected
    lists = {**given, "betas": [0.8, 0.9], "exclude": ["*bias", "*norm*"]}
    assert options.recipe_of("awd", lists, [1, 1], dtype="float16") == expected
    assert options.as_text(["*bias", "*norm*"]) == "*bias *norm*"
    assert options.as_text([]) == ""
    assert options.as_text(0.5) == 0.5


def test_an_empty_text_excludes_nothing():
    assert options.recipe_of("awd", {"exclude": ""}, [1, 1]).exclude == ()


def test_python_values_are_taken():
    sgd = awd_fast.SGD(lr=0.1)
    assert options.recipe_of("awd", {"optimizer": sgd}, [1, 1]) == make_recipe(2, optimizer=sgd)
    assert options.recipe_of("awd", awd_fast.PAPER, [1, 1]) == make_recipe(2, **awd_fast.PAPER)


def test_numbers_may_be_texts_in_yaml():
    assert options.value_of("alpha", "1e-6") == 1e-6
    assert options.value_of("preset", "1e-6") == "1e-6"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": "rows"}, "groups is 'rows'; expected one of row, column, tensor, global"),
        ({"scale": "much"}, "scale is 'much'; expected a finite number"),
        ({"scale": 1.0, "lambda": 1.0}, "both scale and lambda are given"),
        ({"betas": "0.9", "optimizer": "adam"}, "betas is .*expected two numbers"),
        ({"betas": "0.9 x", "optimizer": "adam"}, "betas is 'x'; expected a finite number"),
        ({"optimizer": {"lr": 1}}, "optimizer is {'lr': 1}; expected one of"),
    ],
)
def test_wrong_values(given, message):
    with pytest.raises(InputError, match=message):
        options.recipe_of("awd", given, [1, 1])


def test_names_that_mergekit_would_pass_over():
    options.check_names("awd", "parameters", ["weight", "groups", "lambda"])
    options.check_names("awd", "parameters of M1", ["weight"], of_a_model=True)
    with pytest.raises(InputError, match=r"^parameters has the unknown option 'density'; awd has .*groups.*weight"):
        options.check_names("awd", "parameters", ["density"])
    with pytest.raises(InputError, match=r"^parameters of M1 has the option 'groups', .*; expected weight only$"):
        options.check_names("awd", "parameters of M1", ["groups"], of_a_model=True)
