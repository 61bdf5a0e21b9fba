package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Progress is what echo reports of a transfer.
type Progress struct {
	Sent, Acked, Bytes uint64
	Silence            time.Duration
	Done               bool
	Error              string
}

// A transfer runs between two pods until it is stopped.
type Transfer struct {
	v    *View
	from *corev1.Pod
	id   string
	last chan Progress // the end, once
	err  chan error
}

// StartTransfer has pod from send text to another pod, rate bytes a second.
func (v *View) StartTransfer(ctx context.Context, from *corev1.Pod, to netip.AddrPort, text string, rate int) (*Transfer, error) {
	t := &Transfer{v: v, from: from, id: fmt.Sprint(time.Now().UnixNano()), last: make(chan Progress, 1), err: make(chan error, 1)}
	q := url.Values{"to": {to.String()}, "text": {text}, "rate": {fmt.Sprint(rate)}, "for": {"10m"}, "id": {t.id}}
	target := "http://" + net.JoinHostPort(from.Status.PodIP, "8080") + "/transfer?" + q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client(v.Machine(from.Spec.NodeName)).Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("start transfer: %s", resp.Status)
	}
	running := make(chan struct{})
	go t.follow(resp.Body, running)
	select {
	case <-running:
		return t, nil
	case p := <-t.last:
		return nil, fmt.Errorf("transfer: %s", p.Error)
	case err := <-t.err:
		return nil, err
	}
}

// follow reads Progress until the end; running is closed at the first answer.
func (t *Transfer) follow(body io.ReadCloser, running chan struct{}) {
	defer body.Close()
	started := false
	for lines := bufio.NewScanner(body); lines.Scan(); {
		var p Progress
		if err := json.Unmarshal(lines.Bytes(), &p); err != nil {
			t.err <- err
			return
		}
		if p.Done {
			t.last <- p
			return
		}
		if !started && p.Acked > 0 {
			started = true
			close(running)
		}
	}
	t.err <- fmt.Errorf("the pod that sends is gone")
}

// Stop lets the transfer end and returns what became of it.
func (t *Transfer) Stop(ctx context.Context) (Progress, error) {
	m := t.v.Machine(t.from.Spec.NodeName)
	_, stopErr := t.v.AskFrom(ctx, m, t.from.Status.PodIP, http.MethodPost, "/transfer/stop?id="+t.id)
	select {
	case p := <-t.last:
		if p.Error != "" {
			return p, fmt.Errorf("the transfer broke after %d of %d blocks: %s", p.Acked, p.Sent, p.Error)
		}
		return p, nil
	case err := <-t.err:
		return Progress{}, fmt.Errorf("the transfer broke: %w", err)
	case <-ctx.Done():
		return Progress{}, fmt.Errorf("the transfer does not end: %w", context.Cause(ctx))
	case <-after(stopErr):
		return Progress{}, stopErr
	}
}

// after fires only if there is an error.
func after(err error) <-chan time.Time {
	if err == nil {
		return nil
	}
	return time.After(time.Second)
}

// ShortTransfer sends text from pod to pod for half a second.
func (v *View) ShortTransfer(ctx context.Context, from, to *corev1.Pod, text string) (Progress, error) {
	t, err := v.StartTransfer(ctx, from, Stream(to), text, 2<<20)
	if err != nil {
		return Progress{}, err
	}
	time.Sleep(500 * time.Millisecond) // the length of the transfer, not a wait
	return t.Stop(ctx)
}

// Stream is where echo in a pod takes transfers.
func Stream(p *corev1.Pod) netip.AddrPort {
	a, _ := netip.ParseAddr(p.Status.PodIP)
	return netip.AddrPortFrom(a, 7777)
}
