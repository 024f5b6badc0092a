"""Sweeps over settings with Ray Tune: ordinary runs as trials, one frozen teacher for all of them.

    driver: Tune (search, ASHA) -- settings --> Trial actor: run(config) -- Ray Train --> worker --+
            sweep.json, table, best <- figures -- (ledger of the evaluator)                        | queries
                                                       one teacher service for all trials <--------+

The only package that imports ray.tune. `config.py` does not, so that a job file is read at once.
"""
