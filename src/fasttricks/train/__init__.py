"""The reference trainer: ``fasttricks train`` or ``python -m fasttricks.train``, and ``fasttricks report``.

Needs ``pip install 'fasttricks[train]'``. recipe.py says what a run does, data.py reads the images, loop.py trains,
checkpoint.py and report.py write the results.
"""
