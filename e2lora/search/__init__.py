"""The only rooms that know Ray Tune and Optuna: ledger, thin trials, and the running of a study."""
