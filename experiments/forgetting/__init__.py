"""What a backbone forgets of earlier tasks: `python -m experiments.forgetting`.

Three tasks are trained one after the other on one backbone, each by the same number of sites, in two ways: FedYolo, a
module a task on a backbone that never changes, and full fine-tuning, where each task goes on from the weights that the
one before left. After each stage every task so far is tested anew: by its own module, or by its own classifier on the
backbone as it now is. What a task forgets is its accuracy right after its own training less that at the end.

    tasks.py   the three tasks, as settings of runs
    chain.py   one way through all tasks: real runs in this process, and the tests after each
    table.py   the rows, as CSV and Markdown
"""
