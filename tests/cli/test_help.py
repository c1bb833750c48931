"""Help pages: every option in a group, every example a command that parses, nothing cut at 80 columns."""

import shlex

import click
import pytest
from brfx_cli.help import GROUPS, MANY
from brfx_cli.main import cli
from click.testing import CliRunner


def page(*command):
    done = CliRunner().invoke(cli, [*command, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.output


def options(name):
    return [option for option in cli.commands[name].params if isinstance(option, click.Option) and not option.hidden]


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_on_the_page_in_a_sentence(name):
    text = page(name)
    assert all(len(line) <= 80 for line in text.splitlines()), max(text.splitlines(), key=len)
    for option in options(name):
        assert option.opts[0] in text
        assert option.help and option.help.split("  [default")[0].rstrip(")").endswith("."), option.opts


@pytest.mark.parametrize("name", [name for name in cli.commands if len(options(name)) > MANY])
def test_every_option_of_a_long_page_is_in_a_group(name):
    grouped = [each for names in GROUPS.values() for each in names]
    assert len(grouped) == len(set(grouped))
    assert {option.name for option in options(name)} <= set(grouped)
    text = page(name)
    assert text.index("The first to know:") < text.index("--model") < text.index("Images:") < text.index("More:")


@pytest.mark.parametrize("name", cli.commands)
def test_every_example_is_a_command(name):
    command = cli.commands[name]
    assert command.examples
    for line in command.examples:
        program, called, *arguments = shlex.split(line.split(" > ")[0])
        assert (program, called) == ("brfx", name) and line in page(name)
        command.make_context(called, arguments, parent=cli.make_context("brfx", [called]))


def test_commands_are_listed_with_whole_summaries():
    text = page()
    assert "..." not in text.partition("Commands:")[2].replace("brfx ...", "")
    assert text.index("  quantize ") < text.index("  evaluate ") < text.index("  runs ")


def completed(words):
    """What bash is told for the last of ``words``, without the kind that stands in front."""
    env = {"_BRFX_COMPLETE": "bash_complete", "COMP_WORDS": f"brfx {words}", "COMP_CWORD": str(len(words.split(" ")))}
    return CliRunner().invoke(cli, [], env=env, prog_name="brfx").output.split()


def test_a_shell_completes_commands_and_choices():
    assert "plain,quantize" in completed("qu")
    assert completed("quantize --placement ") == ["plain,deploy", "plain,paper"]
    assert completed("quantize --recipe l") == ["plain,lsq-paper"]
    assert completed("quantize --task d") == ["plain,detection"]
    script = CliRunner().invoke(cli, [], env={"_BRFX_COMPLETE": "bash_source"}, prog_name="brfx").output
    assert "_BRFX_COMPLETE=bash_complete" in script
