"""The exact consistency function, or flow map, of Gaussian data is a fixed point of every method.

Student, teacher and critic have closed forms, in float64. The gradient of each loss with respect to
the weights of smooth perturbations of the student is then zero:

    given x     for each sample, if the method takes the velocity from a teacher
    expected    on average over the data and noise that lead to x, if it takes it from them
    to order p  up to the error of a step of the teacher's solver, if it is discrete

A wrong map has a gradient in all cases.
"""
