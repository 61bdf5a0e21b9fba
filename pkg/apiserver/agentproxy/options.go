package agentproxy

import (
	"fmt"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/conversion"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// AddToScheme teaches the scheme to read the options of the subresources from
// the query of a URL. The scheme must know core/v1.
func AddToScheme(s *runtime.Scheme) error {
	for _, into := range []runtime.Object{
		&corev1.PodLogOptions{}, &corev1.PodExecOptions{}, &corev1.PodAttachOptions{},
		&corev1.PodPortForwardOptions{}, &corev1.PodProxyOptions{}, &corev1.NodeProxyOptions{}, &corev1.ServiceProxyOptions{},
	} {
		err := s.AddConversionFunc((*url.Values)(nil), into, func(in, out any, _ conversion.Scope) error {
			return decodeQuery(*in.(*url.Values), out)
		})
		if err != nil {
			return fmt.Errorf("read %T from a query: %w", into, err)
		}
	}
	return nil
}

// decodeQuery fills the fields of the struct out points to from the query
// parameters of their JSON names. Parameters without a field are ignored: they
// belong to others (timeout, pretty).
func decodeQuery(q url.Values, out any) error {
	v := reflect.ValueOf(out).Elem()
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		values, given := q[name]
		if name == "" || !given || len(values) == 0 {
			continue
		}
		if err := setField(v.Field(i), values); err != nil {
			return fmt.Errorf("query parameter %s=%q: %w", name, values[0], err)
		}
	}
	return nil
}

func setField(f reflect.Value, values []string) error {
	switch p := f.Addr().Interface().(type) {
	case *bool:
		*p = isTrue(values[0])
	case *string:
		*p = values[0]
	case **string:
		*p = &values[0]
	case *[]string:
		*p = values
	case **int64:
		n, err := strconv.ParseInt(values[0], 10, 64)
		if err != nil {
			return fmt.Errorf("want a whole number")
		}
		*p = &n
	case *[]int32:
		for _, s := range values {
			n, err := strconv.ParseInt(s, 10, 32)
			if err != nil {
				return fmt.Errorf("want whole numbers")
			}
			*p = append(*p, int32(n))
		}
	case **metav1.Time:
		if values[0] == "" {
			return nil
		}
		t, err := time.Parse(time.RFC3339, values[0])
		if err != nil {
			return fmt.Errorf("want a time like 2026-01-02T15:04:05Z")
		}
		*p = &metav1.Time{Time: t}
	default:
		return fmt.Errorf("not supported")
	}
	return nil
}

// isTrue reads a flag as Kubernetes does: "?follow" and "?follow=" are true.
func isTrue(s string) bool { return s != "0" && !strings.EqualFold(s, "false") }

// checkLogOptions refuses options that contradict each other.
func checkLogOptions(o *corev1.PodLogOptions) field.ErrorList {
	var errs field.ErrorList
	atLeast := func(name string, v *int64, least int64) {
		if v != nil && *v < least {
			errs = append(errs, field.Invalid(field.NewPath(name), *v, fmt.Sprintf("must be at least %d", least)))
		}
	}
	atLeast("tailLines", o.TailLines, 0)
	atLeast("limitBytes", o.LimitBytes, 1)
	atLeast("sinceSeconds", o.SinceSeconds, 1)
	if o.SinceSeconds != nil && o.SinceTime != nil {
		errs = append(errs, field.Forbidden(field.NewPath(""), "at most one of sinceTime or sinceSeconds may be specified"))
	}
	if s := o.Stream; s != nil {
		switch *s {
		case corev1.LogStreamAll, corev1.LogStreamStdout, corev1.LogStreamStderr:
		default:
			errs = append(errs, field.NotSupported(field.NewPath("stream"), *s, []string{corev1.LogStreamAll, corev1.LogStreamStdout, corev1.LogStreamStderr}))
		}
		if *s != corev1.LogStreamAll && o.TailLines != nil {
			errs = append(errs, field.Forbidden(field.NewPath(""), "`tailLines` and specific `stream` are mutually exclusive for now"))
		}
	}
	return errs
}

// logQuery is the query the agent gets.
func logQuery(o *corev1.PodLogOptions) url.Values {
	q := url.Values{}
	flag := func(name string, on bool) {
		if on {
			q.Set(name, "true")
		}
	}
	number := func(name string, n *int64) {
		if n != nil {
			q.Set(name, strconv.FormatInt(*n, 10))
		}
	}
	flag("follow", o.Follow)
	flag("previous", o.Previous)
	flag("timestamps", o.Timestamps)
	number("sinceSeconds", o.SinceSeconds)
	number("tailLines", o.TailLines)
	number("limitBytes", o.LimitBytes)
	if o.SinceTime != nil {
		q.Set("sinceTime", o.SinceTime.Format(time.RFC3339))
	}
	if o.Stream != nil {
		q.Set("stream", *o.Stream)
	}
	return q
}

// streams says which streams of a process a client wants.
type streams struct{ stdin, stdout, stderr, tty bool }

func (s streams) query() url.Values {
	q := url.Values{}
	for name, on := range map[string]bool{
		corev1.ExecStdinParam: s.stdin, corev1.ExecStdoutParam: s.stdout,
		corev1.ExecStderrParam: s.stderr, corev1.ExecTTYParam: s.tty,
	} {
		if on {
			q.Set(name, "1")
		}
	}
	return q
}
