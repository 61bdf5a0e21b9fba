// Package reviews serves the resources that are questions: who is this token,
// who am I, may I do that. Nothing of them is stored.
package reviews
