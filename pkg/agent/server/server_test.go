package server

import (
	"net/url"
	"testing"
)

func TestMayEnter(t *testing.T) {
	for _, c := range []struct {
		name   string
		groups []string
		want   bool
	}{
		{"meshd-apiserver", nil, true},
		{"admin", []string{"system:masters"}, true},
		{"system:node:n1", []string{"system:nodes"}, false},
		{"", nil, false},
	} {
		if got := mayEnter(c.name, c.groups); got != c.want {
			t.Errorf("%s %v: got %v", c.name, c.groups, got)
		}
	}
}

func TestReadStreams(t *testing.T) {
	for query, want := range map[string]streams{
		"output=1&error=1":               {stdout: true, stderr: true},
		"input=1&output=1&tty=1&error=1": {stdin: true, stdout: true, tty: true},
		"stdout=true":                    {stdout: true},
	} {
		q, _ := url.ParseQuery(query)
		if got, err := readStreams(q); err != nil || got != want {
			t.Errorf("%s: got %+v, %v", query, got, err)
		}
	}
	if _, err := readStreams(url.Values{}); err == nil {
		t.Error("a call for nothing is accepted")
	}
}
