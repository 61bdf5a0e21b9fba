// Package registry turns a table of kinds into REST storages. A row says what
// a kind is called, which of its fields can be selected, how it prints and
// what is particular about it; the generic strategy does the rest: status and
// spec cannot be written through each other's door, the generation rises when
// and only when the spec changes, defaults and validation come from package
// upstream.
package registry
