package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

func doorsPod(*lab) *v1.Pod {
	return pod("", container("main", "say", "one", ";", "say", "two", ";", "http", "8080"))
}

// What kubectl asks of a pod goes through the API server and our door: logs,
// followed ones too, exec, port-forward; and nobody else comes in.
func doorsStory(t *testing.T, l *lab) {
	p := l.phase("doors", v1.PodRunning)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pods := l.admin.CoreV1().Pods("default")
	one := int64(1)
	if b, err := pods.GetLogs("doors", &v1.PodLogOptions{TailLines: &one}).DoRaw(ctx); err != nil || string(b) != "two\n" {
		t.Errorf("log %q, %v", b, err)
	}
	stream, err := pods.GetLogs("doors", &v1.PodLogOptions{Follow: true}).Stream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	lines := bufio.NewScanner(stream)
	for _, want := range []string{"one", "two"} {
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("followed log says %q, want %q", lines.Text(), want)
		}
	}
	if got := l.exec(p, "main", "/busy", "say", "from inside"); got != "from inside\n" {
		t.Errorf("exec says %q", got)
	}
	if got := l.forwarded(p, 8080, "/file/proc/self/comm"); got != "busy\n" {
		t.Errorf("through the forwarded port came %q", got)
	}
	kill(t, l.pid("doors", "main"))
	if lines.Scan() {
		t.Errorf("followed log goes on: %q", lines.Text())
	}
	node, err := tls.LoadX509KeyPair(filepath.Join(l.dir, "pki/node.crt"), filepath.Join(l.dir, "pki/node.key"))
	if err != nil {
		t.Fatal(err)
	}
	for who, certs := range map[string][]tls.Certificate{"a stranger": nil, "a node": {node}} {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certs}}}
		resp, err := client.Get("https://127.0.0.1:10250/pods")
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s gets %s %s", who, resp.Status, b)
		}
	}
}

// forwarded is the body at path of a port of the pod, forwarded to here.
func (l *lab) forwarded(p *v1.Pod, port int, path string) string {
	l.t.Helper()
	rt, upgrader, err := spdy.RoundTripperFor(l.master)
	if err != nil {
		l.t.Fatal(err)
	}
	u := l.admin.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.Namespace).Name(p.Name).SubResource("portforward").URL()
	stop, ready := make(chan struct{}), make(chan struct{})
	defer close(stop)
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: rt}, http.MethodPost, u), []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, &strings.Builder{})
	if err != nil {
		l.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-done:
		l.t.Fatal("forward:", err)
	}
	ports, err := f.GetPorts()
	if err != nil {
		l.t.Fatal(err)
	}
	return l.fetch(fmt.Sprintf("http://127.0.0.1:%d%s", ports[0].Local, path))
}
