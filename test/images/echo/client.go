package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"time"
)

// Fetched is the outcome of one HTTP request made from the pod.
type Fetched struct {
	Status int           `json:"status,omitempty"`
	Body   string        `json:"body,omitempty"`
	Remote string        `json:"remote,omitempty"` // the address the name led to
	Took   time.Duration `json:"took"`
	Error  string        `json:"error,omitempty"`
}

func (f Fetched) failed() error { return asError(f.Error) }

// fetch GETs url over a connection of its own.
func fetch(ctx context.Context, url string, limit time.Duration) Fetched {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var f Fetched
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { f.Remote = i.Conn.RemoteAddr().String() }})
	err := func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		f.Status, f.Body = resp.StatusCode, string(b)
		return err
	}()
	if err != nil {
		f.Error = err.Error()
	}
	f.Took = time.Since(start)
	return f
}

// Resolved is the outcome of one DNS question asked as a program in the pod
// asks it: through /etc/resolv.conf.
type Resolved struct {
	Answers  []string      `json:"answers,omitempty"`
	NotFound bool          `json:"notFound,omitempty"` // NXDOMAIN or no such record
	Took     time.Duration `json:"took"`
	Error    string        `json:"error,omitempty"`
}

func (r Resolved) failed() error { return asError(r.Error) }

// resolve asks for name; kind is A, AAAA, SRV, PTR, or empty for both families.
func resolve(ctx context.Context, name, kind string, limit time.Duration) Resolved {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var r Resolved
	answers, err := ask(ctx, &net.Resolver{PreferGo: true}, name, strings.ToUpper(kind))
	var dns *net.DNSError
	if errors.As(err, &dns) {
		r.NotFound = dns.IsNotFound
	}
	if err != nil {
		r.Error = err.Error()
	}
	r.Answers, r.Took = answers, time.Since(start)
	return r
}

func ask(ctx context.Context, res *net.Resolver, name, kind string) ([]string, error) {
	var answers []string
	switch kind {
	case "", "A", "AAAA":
		network := map[string]string{"": "ip", "A": "ip4", "AAAA": "ip6"}[kind]
		ips, err := res.LookupNetIP(ctx, network, name)
		for _, ip := range ips {
			answers = append(answers, ip.Unmap().String())
		}
		return answers, err
	case "SRV":
		_, srvs, err := res.LookupSRV(ctx, "", "", name)
		for _, s := range srvs {
			answers = append(answers, fmt.Sprintf("%d %d %d %s", s.Priority, s.Weight, s.Port, s.Target))
		}
		return answers, err
	case "PTR":
		return res.LookupAddr(ctx, name)
	}
	return nil, fmt.Errorf("type %q: want A, AAAA, SRV or PTR", kind)
}

func asError(text string) error {
	if text == "" {
		return nil
	}
	return errors.New(text)
}
