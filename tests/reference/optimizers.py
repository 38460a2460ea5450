"""Row-wise Adagrad and lazy Adam written row by row from their formulas."""

import numpy as np


def rowwise_adagrad(table, gradients, *, learning_rate, initial_accumulator, eps):
    """`table` [N, D] after a step for each of `gradients` [steps, N, D]; float64."""
    table, accumulator = np.array(table, np.float64), np.full(len(table), initial_accumulator)
    for gradient in np.asarray(gradients, np.float64):
        for row, g in enumerate(gradient):
            if g.any():
                accumulator[row] += (g**2).mean()
                table[row] -= learning_rate * g / np.sqrt(accumulator[row] + eps)
    return table


def lazy_adam(table, gradients, touched, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """`table` [N, D] after Adam steps in which only the rows that `touched` [steps, N] marks move; float64."""
    table = np.array(table, np.float64)
    first, second = np.zeros_like(table), np.zeros_like(table)
    for step, (gradient, rows) in enumerate(zip(np.asarray(gradients, np.float64), touched, strict=True), 1):
        for row in np.flatnonzero(rows):
            first[row] = b1 * first[row] + (1 - b1) * gradient[row]
            second[row] = b2 * second[row] + (1 - b2) * gradient[row] ** 2
            moved = (first[row] / (1 - b1**step)) / (np.sqrt(second[row] / (1 - b2**step)) + eps)
            table[row] -= learning_rate * (moved + weight_decay * table[row])
    return table
