"""`sixfold eval`: what the quantizers and the compressed cache cost, and what others cost."""

import typer

from sixfold.cli.evaluation.distortion import distortion
from sixfold.cli.evaluation.longbench import longbench
from sixfold.cli.evaluation.niah import niah
from sixfold.cli.evaluation.perplexity import perplexity
from sixfold.cli.evaluation.retrieval import retrieval
from sixfold.cli.evaluation.sensitivity import sensitivity

app = typer.Typer(help="Measure the quantizers and the compressed cache.", no_args_is_help=True)
for command in (distortion, perplexity, niah, retrieval, sensitivity, longbench):
    app.command()(command)
