"""
A small library, and questions of which each has its answer in one passage: for retrieval with the embedded model.
"""

PASSAGES = [
    "The heron stands still in shallow water and waits for fish to swim within reach of its beak.",
    "Bread dough rises because yeast turns sugar into gas, which the gluten of the flour holds.",
    "A connection pool keeps open sockets to the database, so that a query need not connect first.",
    "The violin has four strings, tuned in fifths, and is played with a bow of horsehair.",
    "Glaciers carve valleys as their ice moves slowly downhill under its own weight.",
    "A mortgage is a loan for a house, and the bank may sell the house when it is not repaid.",
]

ANSWERS = {
    "How does a bird catch fish?": PASSAGES[0],
    "Why does dough with yeast rise?": PASSAGES[1],
    "Why reuse database connections?": PASSAGES[2],
    "Which instrument is played with a bow?": PASSAGES[3],
    "How does ice shape a valley?": PASSAGES[4],
    "What happens when a house loan is not repaid?": PASSAGES[5],
}
