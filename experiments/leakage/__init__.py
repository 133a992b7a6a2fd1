"""How much of labels and images can be read off what leaves a site: `python -m experiments.leakage`.

The tensors are those of real training steps, recorded where they cross the seam (wire.py); the attacks are of textbook
kind and need no secret. docs/explanation/leakage.md says what the numbers mean.

    scene.py    what is attacked: a backbone, a site's images, and public images for the attacker to learn from
    wire.py     an encoder that keeps whatever crosses the seam, as its codec leaves it
    steps.py    a site's training steps, one function a mode
    labels.py   attacks on labels: clustering, norm scoring, the classifier's change
    inputs.py   attacks on images: pseudo-inverse of the patch embedding, linear decoders
    table.py    the rows, as CSV and Markdown
"""
