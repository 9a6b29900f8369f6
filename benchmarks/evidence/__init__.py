"""LA, DR and DR+DA of equal cost on generated tasks: what depth recurrence and depth attention are good for.

setup.py says what is compared; run.py trains and evaluates one run, campaign.py all of them, several at a time.
accuracy.py asks the tests. findings.py reads what the runs wrote, figures.py and report.py show it (docs/evidence.md).
"""
