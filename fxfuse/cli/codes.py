"""Exit codes, documented in ``fxfuse --help`` and in the README."""

OK = 0  # done; what was written or compared is equal
DIFFERENT = 1  # two models differ, or what was written is not equal to the original
USAGE = 2  # the command line itself is wrong: an option, an input spec, JSON
INPUT = 3  # SOURCE, weights, inputs or a folder cannot be found, read or used
OUTPUT = 4  # OUT cannot be written
PACKAGE = 5  # an optional package is missing
INTERNAL = 70  # a mistake of fxfuse's (sysexits.h: EX_SOFTWARE)
INTERRUPTED = 130  # Ctrl-C
BROKEN_PIPE = 141  # whoever read stdout went away
TERMINATED = 143  # SIGTERM

TABLE = """\
0    done; what was written or compared is equal
1    the two models differ; convert: what was written is not equal to the original
2    the command line is wrong: an option, an input spec, JSON
3    SOURCE, weights, inputs or a folder cannot be found, read or used
4    OUT cannot be written
5    an optional package is missing
70   a mistake of fxfuse's: please report it
130  interrupted (Ctrl-C); 143 terminated"""
