"""How good a module is on labelled samples: numbers only; pictures and pages are report/evaluation.py's."""

from fedsplit.predict.judge.classes import ClassVerdict as ClassVerdict
from fedsplit.predict.judge.classes import judge_classes as judge_classes
from fedsplit.predict.judge.compare import Comparison as Comparison
from fedsplit.predict.judge.compare import compare as compare
from fedsplit.predict.judge.compare import compare_numbers as compare_numbers
from fedsplit.predict.judge.numbers import NumberVerdict as NumberVerdict
from fedsplit.predict.judge.numbers import judge_numbers as judge_numbers
