"""The paper's experiments, figure by figure, on real data: an application of the library; nothing imports it.

* `formats`, `data`: files and where they are found.
* `problems`, `methods`: what is minimised, and by which optimizers.
* `training`: many settings and seeds in one call, with unfinished work that can be gone on with.
* `lab`: what an experiment is given; `results`, `plots`: what it hands back, and its picture.
* `figure1` and so on: the experiments; `figures`: their registry. A new one is a function and one entry there.
* `command`: the command line. All of this needs the extra `paper`: `pip install "adam_jax[paper]"`.
"""
